"""Scores, critical sets, components, and the slice as a value with laws."""

import copy

import pytest
import torch
from helpers import here
from hypothesis import given
from hypothesis import strategies as st
from models import IMAGES, Mlp, loader, settled
from torch import nn

import neusemslice as nss
from neusemslice import SemanticSlicing, Slice
from neusemslice.graph import Inputs, trace
from neusemslice.optim import MaskedSGD
from neusemslice.slicing import SCORES, critical_sets, shares
from neusemslice.slicing.components import ALIKE

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
GRAPH = trace(Mlp(hidden=5), Inputs((torch.zeros(2, 12),)))
VECTORS = loader(shape=(12,))

masks = st.fixed_dictionaries(
    {site.name: st.lists(st.booleans(), min_size=5, max_size=5) for site in GRAPH.sites}
)
slices = masks.map(lambda raw: Slice(GRAPH, {k: torch.tensor(v) for k, v in raw.items()}))


def made(name="lenet", threshold=0.9, metric="taylor"):
    model = settled(IMAGES[name](), 1, 8, 8)
    profile = nss.profile(model, loader(), ("avg", "var", "taylor"))
    return model, nss.slice(profile, metric, threshold)


@pytest.mark.usefixtures("device")
class TestScores:
    def test_by_hand(self):
        _, slicing = made()
        profile = slicing.profile
        stats, contribution = profile.activations["3"], profile.contributions["3"]
        assert torch.equal(SCORES["avg"](profile, "3"), stats.mean.abs())
        assert torch.equal(SCORES["var"](profile, "3"), stats.m2 / stats.count[:, None])
        assert torch.equal(SCORES["taylor"](profile, "3"), contribution.mean_abs.double())

    def test_shares(self):
        p = shares(torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.float64))
        assert p.tolist() == [[0.25, 0.75], [0, 0]]


class TestCriticalSets:
    @pytest.mark.parametrize(
        ("row", "threshold", "expected"),
        [
            ([0.5, 0.3, 0.2], 0.5, [1, 0, 0]),
            ([0.5, 0.3, 0.2], 0.51, [1, 1, 0]),
            ([0.2, 0.5, 0.3], 0.8, [0, 1, 1]),
            ([0.25, 0.25, 0.25, 0.25], 0.5, [1, 1, 0, 0]),
            ([0.25, 0.25, 0.25, 0.25], 1.0, [1, 1, 1, 1]),
            ([0.6, 0.4, 0.0], 1.0, [1, 1, 0]),
            ([0.0, 0.0, 0.0], 0.9, [0, 0, 0]),
            ([1.0], 0.01, [1]),
            ([0.05] * 20, 0.25, [1] * 5 + [0] * 15),
            ([0.05] * 20, 0.05, [1] + [0] * 19),
            ([0.1] * 10, 0.3, [1] * 3 + [0] * 7),
        ],
    )
    def test_by_hand(self, row, threshold, expected):
        p = torch.tensor([row], dtype=torch.float64)
        assert critical_sets(p, threshold).int().tolist() == [expected]

    @given(
        st.lists(st.lists(st.integers(0, 8), min_size=6, max_size=6), min_size=1, max_size=4),
        st.floats(0.01, 1.0),
    )
    def test_fewest_neurons_that_reach_the_threshold(self, raw, threshold):
        p = shares(torch.tensor(raw, dtype=torch.float64))
        critical = critical_sets(p, threshold)
        for row, chosen in zip(p, critical, strict=True):
            if row.sum() == 0:
                assert not chosen.any()
                continue
            assert row[chosen].sum() >= threshold * row.sum() - 1e-12
            smallest = row[chosen].min()
            assert row[chosen].sum() - smallest < threshold * row.sum() + 1e-12
            assert (row[~chosen] <= smallest).all()

    def test_no_neuron_and_no_class(self):
        assert critical_sets(torch.zeros(3, 0, dtype=torch.float64), 0.5).shape == (3, 0)
        assert critical_sets(torch.zeros(0, 3, dtype=torch.float64), 0.5).shape == (0, 3)


@pytest.mark.usefixtures("device")
class TestSlicing:
    def test_higher_thresholds_contain_lower_ones(self):
        _, slicing = made(threshold=0.5)
        wide = nss.slice(slicing.profile, threshold=0.9)
        assert len(slicing.critical_slice() - wide.critical_slice()) == 0

    def test_classes_choose(self):
        _, slicing = made()
        one, other = slicing.critical_slice([0]), slicing.critical_slice([2])
        assert slicing.critical_slice([0, 2]) == one | other
        with pytest.raises(ValueError, match=r"classes must lie in \[0, 4\), got 4"):
            slicing.critical_slice([4])

    def test_class_similarity_is_that_of_the_sets(self):
        _, slicing = made(threshold=0.6)
        a, b = slicing.critical_slice([1]), slicing.critical_slice([3])
        assert slicing.class_similarity[1, 3] == pytest.approx(len(a & b) / len(a | b))

    def test_components_partition_the_critical_neurons(self):
        _, slicing = made(threshold=0.7)
        parts = [slicing.component_slice(i) for i in range(slicing.num_components)]
        assert all(len(part) for part in parts)
        assert sum(len(part) for part in parts) == len(slicing.critical_slice())
        union = parts[0]
        for part in parts[1:]:
            union = union | part
        assert union == slicing.critical_slice()

    def test_members_of_a_component_are_alike_on_average(self):
        _, slicing = made("residual", threshold=0.9)
        p = torch.cat(list(slicing.shares.values()), 1).t()
        component = torch.cat(list(slicing.components.values()))
        signature = torch.nn.functional.normalize(p - p.mean(1, keepdim=True))
        for i in range(slicing.num_components):
            members = signature[component == i]
            assert float((members @ members.t()).mean()) >= ALIKE - 1e-6

    def test_one_class(self):
        model = settled(Mlp(outputs=1), 12)
        profile = nss.profile(
            model,
            [(x, torch.zeros_like(y)) for x, y in VECTORS],
            loss=lambda output, labels: output.square(),
        )
        slicing = nss.slice(profile, threshold=0.5)
        assert slicing.num_components == 1
        assert slicing.class_groups.tolist() == [0]

    def test_absent_class(self):
        model = settled(Mlp(), 12)
        profile = nss.profile(model, [(x, y.clamp(max=2)) for x, y in VECTORS])
        slicing = nss.slice(profile)
        assert len(slicing.critical_slice([3])) == 0
        assert slicing.class_similarity[3].tolist() == [0, 0, 0, 0]

    def test_a_dead_site_has_no_critical_neuron(self):
        model = settled(Mlp(), 12)
        with torch.no_grad():
            model.second.weight.zero_()
            model.second.bias.fill_(-1)
        slicing = nss.slice(nss.profile(model, VECTORS, ("avg",)), "avg")
        assert not slicing.critical["second"].any()

    def test_round_trip(self, tmp_path):
        _, slicing = made()
        loaded = SemanticSlicing.load(slicing.save(tmp_path / "s"))
        assert loaded.critical_slice() == slicing.critical_slice()
        assert torch.equal(loaded.class_groups, slicing.class_groups)
        for site, component in slicing.components.items():
            assert torch.equal(loaded.components[site], component)
        with pytest.raises(ValueError, match="holds a slicing, expected a profile"):
            nss.Profile.load(tmp_path / "s")


class TestRefusals:
    def test_metric_and_threshold(self):
        profile = nss.profile(settled(Mlp(), 12), VECTORS, ("avg",))
        with pytest.raises(
            ValueError,
            match=r"metric must be one of .*\('avg',\), 'ens' or a function, got 'taylor'",
        ):
            nss.slice(profile)
        for bad in (0.0, -1.0, 1.01, float("nan")):
            with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\], got"):
                nss.slice(profile, "avg", bad)

    @pytest.mark.filterwarnings("ignore:profile. NaN or infinite:RuntimeWarning")
    def test_nonfinite_activations(self):
        model = settled(Mlp(), 12)
        with torch.no_grad():
            model.first.weight[2, 0] = torch.nan
        profile = nss.profile(model, VECTORS, ("avg",))
        with pytest.raises(ValueError, match=r"NaN or infinite at first \(24\), second \(384\)"):
            nss.slice(profile, "avg")

    def test_no_labelled_sample(self):
        profile = nss.profile(
            settled(Mlp(), 12), [(x, torch.full_like(y, -100)) for x, y in VECTORS], ("avg",)
        )
        with pytest.raises(ValueError, match="no sample of any class"):
            nss.slice(profile, "avg")


class TestAlgebra:
    @given(slices, slices, slices)
    def test_laws(self, a, b, c):
        none, whole = Slice(GRAPH, {}), Slice.whole(GRAPH)
        assert a | b == b | a
        assert a & b == b & a
        assert (a | b) | c == a | (b | c)
        assert a & (b | c) == (a & b) | (a & c)
        assert ~(a | b) == ~a & ~b
        assert ~~a == a
        assert a - b == a & ~b
        assert a ^ b == (a | b) - (a & b)
        assert a | none == a == a & whole
        assert len(a | b) + len(a & b) == len(a) + len(b)
        assert (a == b) == (a.digest == b.digest) == (len(a ^ b) == 0)
        assert hash(a) == hash(~~a)

    @given(slices)
    def test_size(self, a):
        assert len(a) == sum(int(mask.sum()) for mask in a.masks().values())
        assert a.density == len(a) / 10

    def test_other_models_do_not_mix(self):
        other = trace(Mlp(hidden=6), Inputs((torch.zeros(2, 12),)))
        with pytest.raises(ValueError, match="two slices are of different models"):
            Slice.whole(GRAPH) | Slice.whole(other)

    def test_wrong_masks(self):
        with pytest.raises(ValueError, match="no site 'third'"):
            Slice(GRAPH, {"third": torch.ones(5, dtype=torch.bool)})
        with pytest.raises(
            ValueError, match=r"mask of site first must have shape \[5\], got \[4\]"
        ):
            Slice(GRAPH, {"first": torch.ones(4, dtype=torch.bool)})
        with pytest.raises(TypeError, match=r"mask of site first must be bool, got torch\.float32"):
            Slice(GRAPH, {"first": torch.ones(5)})

    def test_closing_couples(self):
        graph = trace(IMAGES["residual"](), Inputs((torch.zeros(2, 1, 8, 8),)))
        one = torch.arange(8) == 3
        closed = Slice(graph, {"outer": one}).closed()
        assert torch.equal(closed.mask("conv2"), one)
        assert len(closed) == 2
        assert closed.closed() == closed


class TestFile:
    @given(slices)
    def test_round_trip(self, tmp_path_factory, a):
        path = a.save(tmp_path_factory.mktemp("slice") / "s")
        assert Slice.load(path) == a


@pytest.mark.usefixtures("device")
class TestApplied:
    @pytest.mark.pretended
    @pytest.mark.parametrize("name", IMAGES)
    def test_masked_neurons_are_zero_for_their_readers(self, name):
        model, slicing = made(name, threshold=0.5)
        kept = slicing.critical_slice().closed()
        seen = {}

        def hook(module, args):
            seen[module] = args[0]

        with kept.applied(model):
            handles = [
                model.get_submodule(r.module).register_forward_pre_hook(hook)
                for s in kept.graph.sites
                for r in s.readers
            ]
            model(here(torch.randn(3, 1, 8, 8)))
            for handle in handles:
                handle.remove()
        for site in kept.graph.sites:
            for reader in site.readers:
                x = reader.take(seen[model.get_submodule(reader.module)], site.neurons)
                gone = here((~kept.mask(site.name)).nonzero().squeeze(1))
                assert (x.index_select(reader.neuron_dim, gone) == 0).all()

    def test_the_whole_slice_changes_nothing(self):
        model, slicing = made()
        x = here(torch.randn(3, 1, 8, 8))
        expected = model(x)
        with Slice.whole(slicing.profile.graph).applied(model):
            assert torch.equal(model(x), expected)

    def test_a_nan_in_a_masked_neuron_does_not_get_through(self):
        model, slicing = made()
        kept = ~Slice(slicing.profile.graph, {"3": torch.arange(6) == 2})
        x = here(torch.randn(3, 1, 8, 8))
        with kept.applied(model):
            expected = model(x)
            with torch.no_grad():
                model[3].weight[2] = torch.nan
            assert torch.equal(model(x), expected)

    def test_leaves_the_model_alone_after_an_error_and_when_nested(self):
        model, slicing = made()
        before = copy.deepcopy(model.state_dict())
        x = here(torch.randn(3, 1, 8, 8))
        plain = model(x)
        kept = slicing.critical_slice([0])
        with pytest.raises(RuntimeError, match="stop"), kept.applied(model):
            raise RuntimeError("stop")
        with kept.applied(model):
            once = model(x)
            with slicing.critical_slice([1]).applied(model):
                both = model(x)
            assert torch.equal(model(x), once)
        with (kept & slicing.critical_slice([1])).applied(model):
            assert torch.equal(model(x), both)
        assert torch.equal(model(x), plain)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
        assert not any(m._forward_pre_hooks for m in model.modules())

    def test_a_compiled_model_is_masked_too(self):
        model, slicing = made()
        x = here(torch.randn(3, 1, 8, 8))
        with slicing.critical_slice([0]).applied(model):
            expected = model(x)
        plain = model(x)
        model.compile(backend="aot_eager")
        torch.testing.assert_close(model(x), plain)
        with slicing.critical_slice([0]).applied(model):
            torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x), plain)
        torch.compiler.reset()

    def test_a_wrapper_that_was_compiled_before_is_masked_too(self):
        model, slicing = made()
        x = here(torch.randn(3, 1, 8, 8))
        compiled = torch.compile(model, backend="aot_eager")
        plain = compiled(x)
        with slicing.critical_slice([0]).applied(model):
            expected = model(x)
            torch.testing.assert_close(compiled(x), expected)
        assert not torch.allclose(expected, plain)
        torch.testing.assert_close(compiled(x), plain)
        torch.compiler.reset()

    def test_another_model_is_refused(self):
        _, slicing = made()
        with (
            pytest.raises(ValueError, match=r"belongs to another model: .*Mlp has"),
            slicing.critical_slice().applied(Mlp()),
        ):
            pass


@pytest.mark.usefixtures("device")
class TestParameters:
    @pytest.mark.pretended
    def test_a_step_moves_only_what_the_slice_owns(self):
        model, slicing = made("lenet")
        chosen = Slice(slicing.profile.graph, {"0": torch.arange(4) == 1, "3": torch.arange(6) < 2})
        before = copy.deepcopy(model.state_dict())
        optimizer = MaskedSGD(chosen.parameters(model), lr=0.1)
        answer = model(here(torch.randn(8, 1, 8, 8)))
        nn.functional.cross_entropy(answer, here(torch.arange(8) % 4)).backward()
        optimizer.step()
        changed = {}
        for key, value in model.state_dict().items():
            rows = (value != before[key]).reshape(len(value), -1).any(1) if value.ndim else []
            changed[key] = [i for i, moved in enumerate(rows) if moved]
        moved = {key: rows for key, rows in changed.items() if rows}
        assert moved.pop("0.weight") == [1]
        assert moved.pop("0.bias") == [1]
        assert all(rows == [0, 1] for rows in moved.values())
        assert set(moved) <= {"3.weight", "3.bias", "4.weight", "4.bias"}

    def test_an_empty_slice_is_refused(self):
        with pytest.raises(ValueError, match="slice is empty"):
            Slice(GRAPH, {}).parameters(Mlp(hidden=5))
