"""Critical sets merged over similar classes and layers, and the parameters that slices leave."""

import pytest
import torch
from helpers import here
from hypothesis import given
from hypothesis import strategies as st
from models import IMAGES, Mlp, loader, settled

import neusemslice as nss
from neusemslice import Slice
from neusemslice.graph import Inputs, trace
from neusemslice.slicing import parameters_in_use
from neusemslice.slicing.merging import merged_sets
from neusemslice.slicing.size import neuron_sizes

WIDE = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.5, 0.2, 0.3, 0.0]], dtype=torch.float64)
NARROW = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)


def merged(groups, threshold, sizes=(1, 1)):
    found = merged_sets(
        {"wide": WIDE, "narrow": NARROW},
        torch.tensor(groups),
        dict(zip(("wide", "narrow"), sizes, strict=True)),
        threshold,
    )
    return [mask.nonzero().flatten().tolist() for mask in found.values()]


class TestMerged:
    @pytest.mark.parametrize(
        ("groups", "threshold", "sizes", "wide", "narrow"),
        [
            # Together: 0.5 0.3 0.3 0 and 0.9 0.9 of 2.9.
            ([0, 0], 0.6, (1, 1), [], [0, 1]),
            ([0, 0], 0.7, (1, 1), [0], [0, 1]),
            ([0, 0], 0.8, (1, 1), [0, 1], [0, 1]),
            ([0, 0], 1.0, (1, 1), [0, 1, 2], [0, 1]),
            # Each class for itself: of 2, class 0 takes 0.9 0.5 0.3 0.2, class 1 likewise.
            ([0, 1], 0.45, (1, 1), [], [0, 1]),
            ([0, 1], 0.7, (1, 1), [0], [0, 1]),
            ([0, 1], 0.8, (1, 1), [0, 1, 2], [0, 1]),
            # A neuron of the narrow site costs ten times as much: 0.09 for each parameter.
            ([0, 0], 0.3, (1, 10), [0, 1, 2], []),
            ([0, 0], 0.6, (1, 10), [0, 1, 2], [0]),
        ],
    )
    def test_by_hand(self, groups, threshold, sizes, wide, narrow):
        assert merged(groups, threshold, sizes) == [wide, narrow]

    @given(
        st.lists(st.lists(st.integers(0, 8), min_size=6, max_size=6), min_size=2, max_size=4),
        st.floats(0.01, 1.0),
        st.floats(0.01, 1.0),
        st.integers(1, 50),
    )
    def test_keeps_its_share_and_grows_with_the_threshold(self, raw, a, b, size):
        p = {"one": torch.tensor(raw).double(), "other": torch.tensor(raw).double().flip(1)}
        groups = torch.arange(len(raw)) % 2
        sizes = {"one": size, "other": 3}
        low, high = (merged_sets(p, groups, sizes, theta) for theta in sorted((a, b)))
        assert all(bool((~mask | high[name]).all()) for name, mask in low.items())
        for group in (0, 1):
            share = {name: s[groups == group].amax(0) for name, s in p.items()}
            kept = sum(float(share[name][mask].sum()) for name, mask in high.items())
            assert kept >= max(a, b) * sum(float(s.sum()) for s in share.values()) - 1e-9

    def test_no_neuron_without_a_share(self):
        nothing = {"site": torch.zeros(3, 4, dtype=torch.float64)}
        assert not merged_sets(nothing, torch.zeros(3), {"site": 5}, 1.0)["site"].any()
        none = {"site": torch.zeros(3, 0, dtype=torch.float64)}
        assert merged_sets(none, torch.zeros(3), {"site": 5}, 0.5)["site"].shape == (0,)


@pytest.mark.usefixtures("device")
class TestSlice:
    def test_of_a_model(self):
        model = settled(IMAGES["residual"](), 1, 8, 8)
        slicing = nss.slice(nss.profile(model, loader()), threshold=0.7)
        kept = slicing.merged_slice(model)
        assert kept == slicing.merged_slice(model, 0.7)
        assert 0 < len(kept) < len(slicing.critical_slice())
        assert all(share.kept for share in kept.table())
        assert len(slicing.merged_slice(model, 0.01, floor=2)) >= 2 * len(kept.table())
        every = nss.slice(slicing.profile, threshold=1.0).critical_slice()
        assert slicing.merged_slice(model, 1.0, floor=0) == every

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"threshold": 0.0}, r"threshold must lie in \(0, 1\], got 0"),
            ({"threshold": 1.5}, r"threshold must lie in \(0, 1\], got 1.5"),
            ({"floor": -1}, "floor must not be negative, got -1"),
        ],
    )
    def test_refusals(self, settings, message):
        model = settled(Mlp(), 12)
        slicing = nss.slice(nss.profile(model, loader(shape=(12,))))
        with pytest.raises(ValueError, match=f"merged_slice: {message}"):
            slicing.merged_slice(model, **settings)
        with pytest.raises(ValueError, match=r"belongs to another model: .*site first: layer"):
            slicing.merged_slice(Mlp(hidden=7))


class TestSize:
    def test_by_hand(self):
        model = Mlp(hidden=5, outputs=4)
        graph = trace(model, Inputs((torch.zeros(2, 12),)))
        # Twelve weights and a bias, and a weight in each of five or four readers.
        assert neuron_sizes(model, graph) == {"first": 13 + 5, "second": 6 + 4}
        whole = sum(p.numel() for p in model.parameters())
        assert parameters_in_use(model, Slice.whole(graph)) == whole
        kept = Slice(graph, {"first": torch.arange(5) < 3, "second": torch.arange(5) < 2})
        assert parameters_in_use(model, kept) == 3 * 13 + 2 * (3 + 1) + 4 * (2 + 1)

    def test_a_coupled_neurons_rows_are_read_elsewhere(self):
        model = IMAGES["residual"]()
        graph = trace(model, Inputs((torch.zeros(2, 1, 8, 8),)))
        coupled = next(g for g in graph.groups if len(g.sites) > 1).sites[0]
        site = graph.site(coupled)
        columns = sum(
            span.repeat * tensor.numel() // tensor.shape[span.dim]
            for span in site.columns
            for tensor in [model.get_parameter(span.tensor)]
        )
        assert neuron_sizes(model, graph)[coupled] == columns

    @pytest.mark.pretended
    @pytest.mark.usefixtures("device")
    def test_what_is_not_in_use_changes_nothing(self):
        model = settled(Mlp(), 12)
        slicing = nss.slice(nss.profile(model, loader(shape=(12,))), threshold=0.5)
        kept = slicing.merged_slice(model)
        x = here(torch.randn(3, 12))
        with kept.applied(model):
            expected = model(x)
            for site in kept.graph.sites:
                gone = here((~kept.mask(site.name)).nonzero().flatten())
                for span in (*site.rows, *site.columns):
                    tensor = model.get_parameter(span.tensor)
                    with torch.no_grad():
                        tensor.index_fill_(span.dim, span.indices(gone), 7.0)
            assert torch.equal(model(x), expected)
