"""Budgets, baselines, and a slice's value: numbers by hand, files, hashes, words."""

import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Mlp, loader, settled
from rich.console import Console

import neusemslice as nss
from neusemslice import Slice, _files
from neusemslice.graph import Graph, Inputs, trace
from neusemslice.profiling import Profile
from neusemslice.report import print_slice
from neusemslice.slicing import SiteShare, shares

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
GRAPH = trace(Mlp(hidden=5), Inputs((torch.zeros(2, 12),)))
VECTORS = loader(shape=(12,))

masks = st.fixed_dictionaries(
    {site.name: st.lists(st.booleans(), min_size=5, max_size=5) for site in GRAPH.sites}
)
slices = masks.map(lambda raw: Slice(GRAPH, {k: torch.tensor(v) for k, v in raw.items()}))


def made_of(
    first: list[list[float]], second: list[list[float]], graph: Graph = GRAPH
) -> nss.Profile:
    """A profile whose means are given."""
    profile = Profile.empty(graph, [f"class {k}" for k in range(len(first))], ("avg",))
    for site, means in (("first", first), ("second", second)):
        stats = profile.activations[site]
        stats.mean.copy_(torch.tensor(means, dtype=torch.float64))
        stats.count.fill_(10)
        stats.positions.fill_(10)
    return profile


# Shares of the first site add up in the order 0 1 2 3 for class 0, and 4 3 for class 1.
FIRST = [[0.4, 0.3, 0.2, 0.1, 0.0], [0.0, 0.0, 0.0, 0.25, 0.75]]
SECOND = [[0.9, 0.1, 0.0, 0.0, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]]


def indices(chosen: Slice) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in chosen.masks().items()}


class TestBudgets:
    def slicing(self, threshold: float = 1.0) -> nss.SemanticSlicing:
        return nss.slice(made_of(FIRST, SECOND), "avg", threshold)

    @pytest.mark.parametrize(
        ("settings", "first", "second"),
        [
            ({}, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
            ({"classes": [0]}, [0, 1, 2, 3], [0, 1]),
            ({"classes": [0], "per_site": 0.4}, [0, 1], [0, 1]),
            ({"classes": [1], "per_site": 0.4}, [3, 4], [0, 1]),
            # By hand: 0 of both sites enter at 0, then first 1 at 0.4, 2 at 0.7, 3 and 1 at 0.9.
            ({"classes": [0], "whole": 0.2}, [0], [0]),
            ({"classes": [0], "whole": 0.3}, [0, 1], [0]),
            ({"classes": [0], "whole": 0.4}, [0, 1, 2], [0]),
            ({"whole": 0.3}, [0, 4], [0]),
            ({"classes": [0], "whole": 0.3, "floor": 2}, None, None),
            ({"classes": [0], "whole": 0.4, "floor": 2}, [0, 1], [0, 1]),
            ({"classes": [0], "floor": 3}, [0, 1, 2, 3], [0, 1, 2]),
            ({"classes": [0], "floor": 9}, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
            ({"classes": [], "floor": 1}, [0], [0]),
            ({"classes": []}, [], []),
        ],
    )
    def test_by_hand(self, settings, first, second):
        slicing = self.slicing()
        if first is None:
            with pytest.raises(ValueError, match=r"floor=2 takes 4 neurons, whole=0.3 allows 3"):
                slicing.slice(**settings)
            return
        assert indices(slicing.slice(**settings)) == {"first": first, "second": second}

    @given(
        st.lists(st.lists(st.integers(0, 8), min_size=5, max_size=5), min_size=2, max_size=2),
        st.floats(0.05, 1),
        st.floats(0.05, 1),
    )
    def test_a_smaller_budget_is_within_a_larger(self, raw, a, b):
        slicing = nss.slice(made_of(raw, raw[::-1]), "avg", 0.9)
        critical = slicing.critical_slice()
        less, more = sorted((a, b))
        for budget in ("whole", "per_site"):
            small, large = slicing.slice(**{budget: less}), slicing.slice(**{budget: more})
            assert len(small - large) == 0
            assert len(large - critical) == 0
        assert len(slicing.slice(whole=less)) <= less * GRAPH.neurons
        assert slicing.slice() == critical

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"per_site": 0.0}, r"per_site must lie in \(0, 1\], got 0.0"),
            ({"whole": 1.5}, r"whole must lie in \(0, 1\], got 1.5"),
            ({"whole": float("nan")}, r"whole must lie in \(0, 1\], got nan"),
            ({"floor": -1}, "floor must not be negative, got -1"),
            ({"floor": 3, "per_site": 0.4}, "above the budget of site first, which is 2 of 5"),
            ({"classes": [2]}, r"slice: classes must lie in \[0, 2\), got 2"),
        ],
    )
    def test_refusals(self, settings, message):
        with pytest.raises(ValueError, match=message):
            self.slicing().slice(**settings)


class TestBaselines:
    def test_global_by_hand(self):
        # Both classes have ten samples, so the means over all are those of the two.
        chosen = nss.global_slice(made_of(FIRST, SECOND), "avg", top=0.4)
        assert indices(chosen) == {"first": [0, 4], "second": [0, 1]}

    def test_category_by_hand(self):
        profile = made_of(FIRST, SECOND)
        chosen = nss.category_slice(profile, "avg", top=0.4)
        assert indices(chosen) == {"first": [0, 1, 3, 4], "second": [0, 1]}
        one = nss.category_slice(profile, "avg", top=0.6, classes=[1])
        assert indices(one) == {"first": [3, 4], "second": [0, 1, 2]}

    @pytest.mark.parametrize("way", [nss.global_slice, nss.category_slice])
    def test_refusals(self, way):
        profile = made_of(FIRST, SECOND)
        with pytest.raises(ValueError, match=rf"{way.__name__}: top must lie in \(0, 1\], got 0"):
            way(profile, "avg", top=0)
        with pytest.raises(ValueError, match="metric must be one of"):
            way(profile, "var", top=0.5)

    @pytest.mark.parametrize("metric", ["avg", "var", "taylor", "ens"])
    def test_of_a_model(self, metric):
        profile = nss.profile(settled(Mlp(), 12), VECTORS, ("avg", "var", "taylor"))
        for way in (nss.global_slice, nss.category_slice):
            assert 0 < len(way(profile, metric, top=0.3)) <= len(way(profile, metric, top=0.6))


class TestValue:
    @given(slices, slices)
    def test_jaccard(self, a, b):
        union = len(a | b)
        assert a.jaccard(b) == b.jaccard(a) == (len(a & b) / union if union else 0)
        assert a.jaccard(a) == float(len(a) > 0)

    @given(slices)
    def test_table(self, a):
        table = a.table()
        assert [row.site for row in table] == ["first", "second"]
        assert sum(row.kept for row in table) == len(a)
        assert table[0] == SiteShare("first", 5, int(a.mask("first").sum()))
        assert table[0].density == table[0].kept / 5

    def test_the_table_is_printed(self):
        console = Console(record=True, width=100)
        print_slice(Slice(GRAPH, {"first": torch.arange(5) < 2}), console)
        text = console.export_text()
        assert re.search(r"first +│ +5 +│ +2 +│ +40%", text)
        assert re.search(r"all +│ +10 +│ +2 +│ +20%", text)

    def test_the_hash_is_the_same_in_every_process(self, tmp_path):
        path = Slice(GRAPH, {"first": torch.arange(5) < 2}).save(tmp_path / "s")
        code = f"import neusemslice as n; s = n.Slice.load({str(path)!r}); print(hash(s), s.digest)"
        answer = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        here = Slice.load(path)
        assert answer == [str(hash(here)), here.digest]
        assert here.digest == "5a9f65538c01f0db956d01547bf4da6d"

    def test_a_file_says_what_is_wrong_with_it(self, tmp_path, monkeypatch):
        path = Slice.whole(GRAPH).save(tmp_path / "s")
        whole = path.read_bytes()
        for size in (0, 7, 100, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=f"{path} is not a whole safetensors file"):
                Slice.load(path)
        monkeypatch.setattr(_files, "FORMAT", 99)
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=rf"{path} is of format \d, this version reads 99"):
            Slice.load(path)


class TestExplain:
    def slicing(self) -> nss.SemanticSlicing:
        return nss.slice(made_of(FIRST, SECOND), "avg", 0.9)

    def test_a_neuron(self):
        told = self.slicing().explain(("first", 4))
        assert told.shares == {"class 0": 0.0, "class 1": 0.75}
        assert told.critical == ("class 1",)
        assert told.component.classes == ("class 1",)
        assert str(told).startswith(
            "Neuron 4 of 5 at site first is critical to 1 of 2 classes: class 1. It matters most "
            "to class 1 (75.0% of the site's contribution, 3.8 times an average neuron's). "
            "Component "
        )

    def test_an_idle_neuron(self):
        told = nss.slice(made_of(FIRST, [SECOND[0]] * 2), "avg").explain(("second", 3))
        assert told.component is None
        assert str(told) == (
            "Neuron 3 of 5 at site second is critical to 0 of 2 classes. It is idle."
        )

    def test_a_class(self):
        slicing = self.slicing()
        told = slicing.explain("class 1")
        assert told == slicing.explain(1)
        assert told.critical == {"first": 2, "second": 5}
        assert told.own == {"first": 2, "second": 4}
        assert told.similar == {"class 0": pytest.approx(1 / 10)}
        assert told.group == ()
        text = str(told)
        assert text.startswith(
            "Class class 1 (10 samples) needs 7 of 10 neurons (70.0%) for 90% of its contribution "
            "at each site; 6 of them matter to no other class. Its critical set overlaps most with "
            "those of class 0 (10%). It is grouped alone. "
        )

    def test_a_class_without_samples(self):
        profile = made_of(FIRST, SECOND)
        for stats in profile.activations.values():
            stats.count[1], stats.mean[1] = 0, 0
        told = nss.slice(profile, "avg").explain(1)
        assert told.critical == {"first": 0, "second": 0}
        assert str(told) == (
            "Class class 1 has no sample in the profile, so no neuron is critical to it."
        )

    def test_components(self):
        slicing = self.slicing()
        parts = [slicing.component(i) for i in range(slicing.num_components)]
        assert sum(part.neurons for part in parts) == len(slicing.critical_slice())
        for i, part in enumerate(parts):
            members = slicing.component_slice(i)
            assert part.neurons == len(members)
            assert part.sites == {row.site: row.kept for row in members.table() if row.kept}
            total = torch.zeros(2, dtype=torch.float64)
            for site, mask in members.masks().items():
                total += slicing.shares[site][:, mask].sum(1) / 2
            assert list(part.weights.values()) == pytest.approx(total.tolist())
        kept = sum(part.weight for part in parts)
        lost = [slicing.shares[s][:, c < 0].sum() / 4 for s, c in slicing.components.items()]
        assert kept + float(sum(lost)) == pytest.approx(1)

    @pytest.mark.parametrize(
        ("subject", "error", "message"),
        [
            (2, ValueError, r"explain: classes must lie in \[0, 2\), got 2"),
            ("cat", KeyError, "no class 'cat'; there are class 0, class 1"),
            (("third", 0), KeyError, "no site 'third'"),
            (("first", 5), IndexError, r"neurons of site first lie in \[0, 5\), got 5"),
        ],
    )
    def test_refusals(self, subject, error, message):
        with pytest.raises(error, match=message):
            self.slicing().explain(subject)
        with pytest.raises(IndexError, match=r"numbers lie in \[0, "):
            self.slicing().component(-1)


def test_shares_of_the_profile_by_hand():
    slicing = nss.slice(made_of(FIRST, SECOND), "avg")
    assert torch.equal(slicing.shares["first"], shares(torch.tensor(FIRST, dtype=torch.float64)))
