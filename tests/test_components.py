"""Semantic components: recovered where they are known, no chains, any size, the odd profiles."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from test_choosing import FIRST, SECOND, made_of
from torch import Tensor

import neusemslice as nss
from neusemslice.graph import Graph
from neusemslice.slicing.components import ALIKE, components


def found(p: Tensor, critical: Tensor | None = None) -> Tensor:
    """Components of one site's shares, given neuron by neuron, ``[C, K]``."""
    critical = torch.ones_like(p.t(), dtype=torch.bool) if critical is None else critical
    return components({"site": p.t().double()}, {"site": critical})["site"]


def planted(neurons: int, kinds: int, classes: int, noise: float) -> tuple[Tensor, Tensor]:
    """Shares of neurons of known kinds, and the kinds."""
    stands = (torch.rand(kinds, classes) < 0.3).double()
    stands[:, 0], stands[torch.arange(kinds), 1 + torch.arange(kinds) % (classes - 1)] = 0, 1
    kind = torch.arange(neurons) % kinds
    size = torch.randn(neurons, 1).exp()
    p = stands[kind] + noise * torch.rand(neurons, classes, dtype=torch.float64)
    return p * size / (p * size).sum(0), kind


def same_partition(a: Tensor, b: Tensor) -> bool:
    pairs = torch.stack([a, b]).unique(dim=1).shape[1]
    return pairs == len(a.unique()) == len(b.unique())


class TestComponents:
    @pytest.mark.parametrize("block", [1024, 16, 5])
    def test_planted_kinds_are_found(self, monkeypatch, block):
        monkeypatch.setattr("neusemslice.slicing.components.BLOCK", block)
        eye = torch.eye(12, dtype=torch.float64)
        kind = torch.arange(300) % 12
        p = (eye[kind] + 0.1 * torch.rand(300, 12)) * torch.randn(300, 1).exp()
        assert same_partition(found(p), kind)

    def test_one_block_is_average_linkage(self):
        p, _ = planted(80, 6, 10, 0.8)
        unit = p - p.mean(1, keepdim=True)
        tree = hierarchy.linkage(unit.numpy(), "average", "correlation")
        # Rows are centred already, so their correlation is that of the signatures.
        expected = torch.from_numpy(hierarchy.fcluster(tree, 1 - ALIKE, "distance"))
        got = found(p)
        # Neurons that linkage leaves alone may join a group to which they are alike on average.
        several = expected.bincount()[expected] > 1
        assert same_partition(got[several], expected[several])

    def test_a_chain_does_not_hold_together(self):
        angle = torch.linspace(0, torch.pi, 200, dtype=torch.float64)
        axes = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1]], dtype=torch.float64) / 2**0.5
        chain = angle.cos()[:, None] * axes[0] + angle.sin()[:, None] * axes[1] + 1
        got = found(chain)
        assert got.max() >= 2
        unit = chain - chain.mean(1, keepdim=True)
        for part in range(int(got.max()) + 1):
            members = unit[got == part]
            assert float((members @ members.t()).mean()) >= ALIKE - 1e-6

    @given(st.integers(0, 1000), st.sampled_from([4, 16, 1024]))
    def test_every_critical_neuron_is_in_one(self, seed, block):
        torch.manual_seed(seed)
        p = torch.rand(40, 6) * (torch.rand(40, 6) < 0.5)
        critical = torch.rand(6, 40) < 0.3
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("neusemslice.slicing.components.BLOCK", block)
            got = found(p, critical)
            assert torch.equal(got, found(p, critical))
        assert torch.equal(got >= 0, critical.any(0))
        sizes = got[got >= 0].bincount()
        assert (sizes > 0).all()
        weights = torch.zeros(len(sizes)).double()
        weights.index_add_(0, got[got >= 0], p.double().amax(1)[got >= 0])
        assert torch.equal(weights.argsort(descending=True, stable=True), torch.arange(len(sizes)))

    def test_size_does_not_matter(self):
        p, _ = planted(60, 5, 8, 0.5)
        scaled = p * torch.rand(60, 1) * 100
        assert same_partition(found(p), found(scaled))

    def test_neurons_without_a_preference_are_one(self):
        p = torch.full((10, 3), 0.1)
        p[7:, 0] = 0.3
        got = found(p)
        assert len(got[:7].unique()) == len(got[7:].unique()) == 1
        assert got[0] != got[9]

    def test_halves_agree(self):
        from sklearn.metrics import adjusted_rand_score

        p, kind = planted(600, 12, 10, 0.1)
        noisy = [p * (1 + 0.2 * torch.randn_like(p)).clamp_min(0) for _ in range(2)]
        a, b = (found(half) for half in noisy)
        assert adjusted_rand_score(a, b) > 0.9
        assert adjusted_rand_score(a, kind) > 0.8


class TestOddProfiles:
    def test_one_class(self):
        slicing = nss.slice(made_of(FIRST[:1], SECOND[:1]), "avg", 1.0)
        assert slicing.num_components == 1
        assert slicing.component(0).classes == ()
        assert str(slicing.explain(0)).startswith("Class class 0 (10 samples) needs 6 of 10 ")
        assert slicing.class_similarity.tolist() == [[1.0]]

    def test_one_neuron(self):
        graph = nss.profile(OneNeuron(), [(torch.rand(4, 3), torch.arange(4) % 2)], ("avg",)).graph
        slicing = nss.slice(made_of_one(graph), "avg")
        assert [c.tolist() for c in slicing.critical.values()] == [[[True], [True]]]
        assert slicing.num_components == 1
        assert slicing.slice(per_site=0.01).masks()["first"].tolist() == [True]

    def test_a_site_with_all_equal_scores(self):
        slicing = nss.slice(made_of([[0.7] * 5] * 2, SECOND), "avg", 0.6)
        assert slicing.critical["first"].int().tolist() == [[1, 1, 1, 0, 0]] * 2
        assert len(slicing.components["first"][:3].unique()) == 1
        whole = nss.slice(made_of([[0.7] * 5] * 2, SECOND), "avg", 1.0)
        assert whole.critical["first"].all()

    def test_an_absent_class(self):
        absent = made_of([FIRST[0], [0.0] * 5], [SECOND[0], [0.0] * 5])
        for stats in absent.activations.values():
            stats.count[1] = 0
        slicing = nss.slice(absent, "avg", 1.0)
        assert len(slicing.slice([1])) == 0
        assert len(slicing.slice([1], floor=2)) == 4
        assert slicing.component_weights[:, 1].tolist() == [0.0] * slicing.num_components

    def test_no_neuron_is_critical(self):
        nothing = nss.slice(made_of([[0.0] * 5] * 2, [[0.0] * 5] * 2), "avg")
        assert nothing.num_components == 0
        assert len(nothing.slice()) == 0
        assert nothing.component_weights.shape == (0, 2)
        assert nothing.explain(0).components == ()


class OneNeuron(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = torch.nn.Linear(3, 1), torch.nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu())


def made_of_one(graph: Graph) -> nss.Profile:
    profile = nss.Profile.empty(graph, ["a", "b"], ("avg",))
    profile.activations["first"].mean.copy_(torch.tensor([[0.5], [2.0]]))
    profile.activations["first"].count.fill_(3)
    return profile


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_200_000_neurons_of_100_classes():
    """In a process of its own, whose peak memory is then the slicing's."""
    done = subprocess.run(
        [sys.executable, "-c", "from bench.slicing import slice_big; print(*slice_big(50))"],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    _, mebibytes, components, purity = map(float, done.stdout.split())
    assert components > 200
    assert purity > 0.9
    assert mebibytes * 2**20 < 2e9
