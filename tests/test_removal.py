"""On every architecture: what is removed is what was masked, or it is kept whole and the reason
said; and a mapping that cuts others than it says does not get through."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import here
from models import IMAGES, Reused, Tied, images, settled
from torch import Tensor, nn
from transformer_models import (
    CONFIGS,
    CONVNETS,
    GPT2,
    LLAMA,
    OTHERS,
    batch,
    built,
    convnet,
    transformer,
)

from neusemslice.graph import Inputs, cut, trace
from neusemslice.maintain.cost import parameter_count, sliced_cost
from neusemslice.maintain.cutting import TOLERANCE, check_pruned, prune
from neusemslice.slicing import Slice

pytestmark = pytest.mark.usefixtures("device")


class Dense(nn.Module):
    """A block in which each convolution reads all that came before it, and a transition."""

    def __init__(self, growth: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        widths = [6 + growth * i for i in range(layers + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(w, growth, 3, padding=1) for w in widths[:-1])
        self.transition = nn.Conv2d(widths[-1], 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.head(F.relu(self.transition(F.relu(self.norms[-1](x)))).mean((2, 3)))


class Decoder(nn.Module):
    """Transposed convolutions, one of them depthwise, and an instance norm without affine."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.each = nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.norm = nn.InstanceNorm2d(5)
        self.last = nn.Conv2d(5, 7, 3)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.each(F.relu(self.down(x)))))
        return self.head(F.relu(self.last(F.relu(self.norm(x)))).mean((2, 3)))


class Scaled(nn.Module):
    """Parameters of no layer that neurons meet on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.second = nn.Conv2d(6, 5, 1)
        self.shift = nn.Parameter(torch.rand(5))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x)) * self.scale
        return self.head(F.relu(self.second(x).mean((2, 3)) + self.shift))


class Shaped(nn.Module):
    """A network that writes its width down, and one that adds its own input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        if self.kind == "written down":
            hidden = hidden.view(-1, 12)
        elif self.kind == "input added":
            hidden = hidden + x
        return self.head(F.relu(self.second(hidden)))


def of_images(make):
    torch.manual_seed(0)
    return settled(make(), 1, 8, 8), Inputs((here(images(3, 1, 8, 8)),))


def of_vectors(make):
    torch.manual_seed(0)
    return settled(make(), 12), Inputs((here(images(3, 12)),))


def of_text(*configuration):
    return built(*configuration), Inputs(kwargs=here(batch("llama")))


NETWORKS = {
    **{name: functools.partial(of_images, make) for name, make in IMAGES.items()},
    "dense": functools.partial(of_images, Dense),
    "decoder": functools.partial(of_images, Decoder),
    "scaled": functools.partial(of_images, Scaled),
    "reused": functools.partial(of_vectors, Reused),
    "tied": functools.partial(of_vectors, Tied),
    "tied gpt2": functools.partial(of_text, "GPT2LMHeadModel", "GPT2Config", GPT2),
    "tied llama": functools.partial(
        of_text,
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA | {"tie_word_embeddings": True},
    ),
}
WHOLE = {"grouped"}
"""Networks in which nothing can be removed."""


def network(name):
    """A network in evaluation mode and inputs for it."""
    if name in NETWORKS:
        return NETWORKS[name]()
    inputs = Inputs(kwargs=here(batch(name)))
    if name in CONVNETS:
        return convnet(name), inputs
    return transformer(name, "eager" if name in OTHERS else "sdpa"), inputs


def some(graph, seed):
    """A slice with a random part of each group that can lose neurons, as many as must stay."""
    generator = torch.Generator().manual_seed(seed)
    masks = Slice.whole(graph).masks()
    for group in graph.groups:
        if not group.kept_whole:
            size = graph.site(group.sites[0]).neurons
            order = torch.randperm(size, generator=generator)
            least, most = group.least, max(group.least, size - 1)
            count = int(torch.randint(least, most + 1, (), generator=generator))
            mask = torch.zeros(size, dtype=torch.bool)
            mask[order[:count]] = True
            masks.update(dict.fromkeys(group.sites, mask))
    return Slice(graph, masks)


ALL = [*NETWORKS, *CONVNETS, *CONFIGS, *OTHERS]


@pytest.mark.parametrize("name", ALL)
def test_pruned_equals_masked(name):
    model, inputs = network(name)
    graph = trace(model, inputs)
    assert all(group.kept_whole for group in graph.groups) == (name in WHOLE)
    for seed in range(3):
        kept = some(graph, seed)
        small = prune(model, kept)
        assert check_pruned(model, small, kept, inputs) <= TOLERANCE
        assert parameter_count(small) == sliced_cost(model, graph, kept)[0]
        assert (parameter_count(small) < parameter_count(model)) == (name not in WHOLE)


@pytest.mark.parametrize("name", [name for name in ALL if name not in WHOLE])
def test_a_wrong_mapping_raises(name):
    """Each site in turn loses another neuron than it says."""
    model, inputs = network(name)
    graph = trace(model, inputs)
    for group in graph.groups:
        size = graph.site(group.sites[0]).neurons
        if group.kept_whole or size < 2:
            continue
        mask = torch.arange(size) != 0
        kept = Slice(graph, Slice.whole(graph).masks() | dict.fromkeys(group.sites, mask))
        other = cut(model, graph, dict.fromkeys(group.sites, mask.roll(1)))
        with pytest.raises(RuntimeError, match="the pruned model differs from the masked one"):
            check_pruned(model, other, kept, inputs)


class TestKeptWhole:
    """What cannot be removed says why, and is there after all the rest has gone."""

    @pytest.mark.parametrize(
        ("name", "site", "reason"),
        [
            ("padded", "stem", "shares only a part of conv2's neurons"),
            ("grouped", "first", "grouped is a grouped convolution"),
            ("grouped", "third", "norm (GroupNorm) mixes"),
            ("vit", "vit.layers.0.attention.o_proj", "(LayerNorm) mixes or transforms neurons"),
            (
                "bloom",
                "transformer.h.0.self_attention.query_key_value",
                "does not run without some",
            ),
            ("olmo2", "model.layers.0.self_attn.v_proj", "does not run without some"),
            ("tied gpt2", "transformer.h.0.attn.c_proj", "lm_head shares a parameter with another"),
        ],
    )
    def test_reasons(self, name, site, reason):
        model, inputs = network(name)
        graph = trace(model, inputs)
        assert reason in graph.groups[graph.site(site).group].kept_whole
        small = prune(model, some(graph, 0))
        for span in graph.site(site).rows:
            assert (
                small.state_dict()[span.tensor].shape[span.dim]
                == (model.state_dict()[span.tensor].shape[span.dim])
            )

    @pytest.mark.parametrize("kind", ["written down", "input added"])
    def test_a_width_that_the_model_relies_on(self, kind):
        model, inputs = of_vectors(functools.partial(Shaped, kind))
        graph = trace(model, inputs)
        whole = {site.name: graph.groups[site.group].kept_whole for site in graph.sites}
        assert whole["first"].startswith("the model does not run without some of them: Runtime")
        assert whole["second"] == ""

    @pytest.mark.parametrize(
        ("name", "layer", "reason"),
        [
            ("reused", "twice", "used more than once in a forward pass"),
            ("tied", "one", "shares a parameter with another module"),
            ("tied", "two", "shares a parameter with another module"),
        ],
    )
    def test_layers_that_are_no_sites(self, name, layer, reason):
        model, inputs = network(name)
        graph = trace(model, inputs)
        assert reason in graph.skipped[layer]
        small = prune(model, some(graph, 0))
        shape = model.get_submodule(layer).weight.shape
        assert small.get_submodule(layer).weight.shape == shape

    def test_tied_embeddings_stay_tied(self):
        for name in ("tied gpt2", "tied llama"):
            model, inputs = network(name)
            small = prune(model, some(trace(model, inputs), 0))
            assert small.get_input_embeddings().weight is small.get_output_embeddings().weight


class TestCopy:
    def test_sizes_are_those_of_the_weights(self):
        model, inputs = network("decoder")
        graph = trace(model, inputs)
        masks = {s.name: torch.arange(s.neurons) % 2 == 0 for s in graph.sites}
        small = cut(model, graph, masks)
        assert (small.each.in_channels, small.each.out_channels, small.each.groups) == (3, 3, 3)
        assert (small.up.in_channels, small.up.out_channels) == (3, 3)
        assert small.norm.num_features == 3
        assert (small.head.in_features, small.head.out_features) == (4, 4)

    def test_the_model_is_left_alone(self):
        model, inputs = network("phi3")
        graph = trace(model, inputs)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        small = prune(model, some(graph, 1))
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
        attention = "model.layers.0.self_attn"
        assert model.get_submodule(attention).config is model.config
        assert small.config.num_attention_heads == model.config.num_attention_heads

    def test_what_is_kept_is_not_shared(self):
        model, inputs = network("lenet")
        small = prune(model, Slice.whole(trace(model, inputs)))
        own = {p.data_ptr() for p in model.parameters()}
        assert own.isdisjoint(p.data_ptr() for p in small.parameters())
