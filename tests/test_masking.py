"""A slice applied: norms that mix neurons, blocks within blocks, models that do not fit."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import Grouped, Mlp, Tokens, settled
from torch import Tensor, nn
from transformer_models import batch, transformer

from neusemslice import Slice
from neusemslice.graph import Graph, Inputs, trace


class Normed(nn.Module):
    """A convolution whose neurons pass one norm on the way to the next."""

    def __init__(self, norm: nn.Module, channels: int = 12) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.norm = norm
        self.read = nn.Conv2d(channels, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(F.relu(self.conv(x))))
        return self.head(F.relu(self.read(x)).mean((2, 3)))


class ChannelsFirstLayerNorm(nn.Module):
    """Over the channels of an image, as in ConvNeXt."""

    data_format = "channels_first"

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


def traced(
    model: nn.Module, *shape: int, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Graph]:
    model = settled(model, *shape, device=device)
    return model, trace(model, Inputs((torch.randn(3, *shape),)))


def seen_by(model: nn.Module, inputs: Inputs, names: set[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What modules read, and what they return as others get it."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: (args[0], output)})
        )
        for name in names
    ]
    with torch.no_grad():
        inputs.run(model)
    for handle in handles:
        handle.remove()
    return seen


NORMS = {
    "layer": (lambda: nn.LayerNorm((12, 8, 8)), 12),
    "group": (lambda: nn.GroupNorm(3, 12), 3),
    "group of all": (lambda: nn.GroupNorm(1, 12), 1),
    "groups of one": (lambda: nn.GroupNorm(12, 12), 12),
    "channels first": (ChannelsFirstLayerNorm, 12),
}


class TestNorms:
    @pytest.mark.parametrize("name", NORMS)
    def test_are_found_with_their_units(self, name):
        make, units = NORMS[name]
        _, graph = traced(Normed(make()), 1, 8, 8)
        (norm,) = graph.norms
        assert (norm.name, norm.features, norm.units) == ("norm", 12, units)
        assert [place.module for place in graph.site("conv").norms] == ["norm"]
        assert Graph.from_json(graph.to_json()) == graph

    @pytest.mark.pretended
    @pytest.mark.parametrize("name", NORMS)
    def test_neurons_are_masked_before_and_after(self, name, device):
        make, units = NORMS[name]
        model, graph = traced(Normed(make()), 1, 8, 8, device=device)
        keep = torch.arange(12) < 5
        expected = keep.view(units, -1).any(1).repeat_interleave(12 // units)
        x = torch.randn(3, 1, 8, 8).to(device)
        kept = Slice(graph, {"conv": keep}) | ~Slice(graph, {"conv": torch.ones(12) > 0})
        with kept.applied(model):
            seen = seen_by(model, Inputs((x,)), {"norm"})
            got = model(x)
        for tensor in seen["norm"]:
            assert (tensor[:, ~expected] == 0).all()
            assert (tensor[:, expected] != 0).any()
        shape, there = (1, 12, 1, 1), expected.to(device)
        y = torch.where(there.view(shape), F.relu(model.conv(x)), 0.0)
        y = torch.where(there.view(shape), F.relu(model.norm(y)), 0.0)
        y = model.head(F.relu(model.read(y)).mean((2, 3)))
        torch.testing.assert_close(got, y)
        assert torch.equal(kept.closed().mask("conv"), expected)

    @given(st.lists(st.booleans(), min_size=12, max_size=12))
    def test_closing_keeps_whole_groups(self, raw):
        closed = Slice(GROUPED, {"conv": torch.tensor(raw)}).closed()
        groups = closed.mask("conv").view(3, 4)
        assert torch.equal(groups.any(1), groups.all(1))
        assert torch.equal(groups.any(1), torch.tensor(raw).view(3, 4).any(1))
        assert closed.closed() == closed

    def test_masked_neurons_do_not_reach_others_through_the_norm(self):
        model, graph = traced(Tokens(), 5, 12)
        kept = ~Slice(graph, {"embed": torch.arange(8) == 3})
        x = torch.randn(3, 5, 12)
        with kept.applied(model):
            read, _ = seen_by(model, Inputs((x,)), {"inner"})["inner"]
            with torch.no_grad():
                model.embed.bias[3] = 100.0
            assert torch.equal(seen_by(model, Inputs((x,)), {"inner"})["inner"][0], read)

    def test_a_norm_called_twice_is_left_alone(self):
        class Twice(Normed):
            def forward(self, x: Tensor) -> Tensor:
                x = self.norm(F.relu(self.norm(F.relu(self.conv(x)))))
                return self.head(F.relu(self.read(x)).mean((2, 3)))

        _, graph = traced(Twice(nn.GroupNorm(3, 12)), 1, 8, 8)
        assert graph.norms == ()


pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
GROUPED = trace(Normed(nn.GroupNorm(3, 12)).eval(), Inputs((torch.randn(2, 1, 8, 8),)))


class TestTransformers:
    @pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
    def test_every_site_is_masked_where_it_is_read(self, name):
        model = transformer(name)
        inputs = Inputs(kwargs=batch(name))
        graph = trace(model, inputs)
        generator = torch.Generator().manual_seed(1)
        kept = Slice(
            graph,
            {s.name: torch.rand(s.neurons, generator=generator) < 0.6 for s in graph.sites},
        )
        modules = {p.module for s in graph.sites for p in (*s.readers, *s.norms)}
        assert any(site.norms for site in graph.sites)
        with kept.applied(model):
            seen = seen_by(model, inputs, modules)
        for site in graph.sites:
            gone = (~kept.mask(site.name)).nonzero().flatten()
            for place in (*site.readers, *site.norms):
                parts = seen[place.module] if place in site.norms else seen[place.module][:1]
                for x in parts:
                    part = place.take(x, site.neurons)
                    assert (part.index_select(place.neuron_dim, gone) == 0).all(), place
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class TestBlocks:
    def test_the_intersection_holds_inside_where_groups_are_whole(self):
        model, graph = traced(Normed(nn.GroupNorm(3, 12)), 1, 8, 8)
        x = torch.randn(3, 1, 8, 8)
        rest = ~Slice(graph, {"conv": torch.ones(12, dtype=torch.bool)})
        # Neurons 4 and 5 share a group that neither slice drops, but nothing is left of it.
        one = rest | Slice(graph, {"conv": torch.tensor([1, 0, 0, 0, 1, 0] + [0] * 6) > 0})
        other = rest | Slice(graph, {"conv": torch.tensor([1, 0, 0, 0, 0, 1] + [0] * 6) > 0})
        with (one & other).applied(model):
            expected = model(x)
        with one.applied(model):
            alone = model(x)
            with other.applied(model):
                assert torch.equal(model(x), expected)
            assert torch.equal(model(x), alone)
        assert not torch.equal(alone, expected)

    def test_an_error_inside_leaves_the_outer_block_in_force(self):
        model, graph = traced(Mlp(), 12)
        x = torch.randn(3, 12)
        one, other = (Slice(graph, {"first": torch.arange(16) % k == 0}) for k in (2, 3))
        with one.applied(model):
            expected = model(x)
            with pytest.raises(RuntimeError, match="stop"), other.applied(model):
                raise RuntimeError("stop")
            assert torch.equal(model(x), expected)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_slices_of_other_sites_hold_together(self):
        model, graph = traced(Mlp(), 12)
        x = torch.randn(3, 12)
        first = Slice(graph.only(["first"]), {"first": torch.arange(16) < 9})
        second = Slice(graph.only(["second"]), {"second": torch.arange(16) < 7})
        both = Slice(graph, {"first": torch.arange(16) < 9, "second": torch.arange(16) < 7})
        with both.applied(model):
            expected = model(x)
        with first.applied(model), second.applied(model):
            assert torch.equal(model(x), expected)

    def test_a_model_compiled_before_with_a_norm(self):
        model, graph = traced(Normed(nn.GroupNorm(3, 12)), 1, 8, 8)
        x = torch.randn(3, 1, 8, 8)
        compiled = torch.compile(model, backend="aot_eager")
        plain = compiled(x)
        kept = ~Slice(graph, {"conv": torch.arange(12) >= 8})
        with kept.applied(model):
            expected = model(x)
            torch.testing.assert_close(compiled(x), expected)
        assert not torch.allclose(expected, plain)
        torch.testing.assert_close(compiled(x), plain)
        torch.compiler.reset()


class TestOtherModels:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                Mlp(hidden=9),
                r"site first: layer first must have 12 inputs and 16 outputs, has 12 and 9",
            ),
            (Grouped(), r"site first: layer first must have 12 inputs and 16 outputs, has 1 and 8"),
            (
                nn.Sequential(Mlp()),
                r"site first: the model has no layer first",
            ),
            (Mlp(outputs=5), r"site second: layer head must have .* 4 outputs, has 16 and 5"),
        ],
        ids=["narrower", "another", "nested", "more classes"],
    )
    def test_are_refused_by_the_site_that_differs(self, model, message, tmp_path):
        _, graph = traced(Mlp(), 12)
        whole = Slice.whole(graph)
        with pytest.raises(ValueError, match=message), whole.applied(model):
            pass
        path = whole.save(tmp_path / "s")
        with pytest.raises(ValueError, match=f"{path}: the slice belongs to another .*{message}"):
            Slice.load(path, model)
        assert Slice.load(path, Mlp()) == whole

    def test_are_refused_where_only_other_tensors_differ(self):
        model, graph = traced(Mlp(), 12)
        model.register_buffer("scale", torch.ones(3))
        with pytest.raises(ValueError, match="its sites fit, other tensors do not"):
            Slice.whole(graph).check_model(model)
