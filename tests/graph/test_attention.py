"""Attention heads: found by what a model does, verified on it, or left out with the reason."""

import copy
import functools
import json

import pytest
import torch
from helpers import here
from models import Pooled, images
from transformer_models import CONFIGS, LLAMA, Attending, Encoder, batch, library, transformer

from neusemslice.graph import Graph, Inputs, Reader, Span, trace
from neusemslice.slicing import Slice


@functools.cache
def traced(name, attention="sdpa", **changes):
    return trace(transformer(name, attention, **changes), Inputs(kwargs=batch(name)))


def heads_of(graph):
    return [s for s in graph.sites if s.readers[0].repeat > 1]


def read_at(model, module, inputs):
    """What a module reads in a forward pass."""
    seen = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        inputs.run(model)
    hook.remove()
    return seen[0]


def assert_rows_make_their_features(model, site, inputs):
    """Changing a neuron's rows changes the neuron's features at the reader and no others."""
    reader = site.readers[0]
    plain = read_at(model, reader.module, inputs)
    for neuron in range(site.neurons):
        for kind in (".weight", ".bias"):
            spans = [span for span in site.rows if span.tensor.endswith(kind)]
            if not spans:
                continue
            changed = copy.deepcopy(model)
            with torch.no_grad():
                for span in spans:
                    rows = here(span.indices(torch.tensor([neuron])))
                    own = changed.get_parameter(span.tensor)
                    noise = torch.randn_like(own.index_select(span.dim, rows))
                    own.index_add_(span.dim, rows, noise)
            moved = (read_at(changed, reader.module, inputs) != plain).flatten(0, -2).any(0).cpu()
            expected = torch.zeros(len(moved), dtype=torch.bool)
            expected[neuron * reader.repeat : (neuron + 1) * reader.repeat] = True
            assert torch.equal(moved, expected), (site.name, neuron, kind)


SEPARATE = {
    "vit": ("vit.layers.{}.attention.{}_proj", 4, 4, 4, 4),
    "bert": ("bert.encoder.layer.{}.attention.self.{}", 4, 4, 4, 4),
    "llama": ("model.layers.{}.self_attn.{}_proj", 2, 8, 8, 4),
    "qwen2": ("model.layers.{}.self_attn.{}_proj", 2, 8, 8, 4),
    "qwen3": ("model.layers.{}.self_attn.{}_proj", 2, 16, 16, 8),
    "mixtral": ("model.layers.{}.self_attn.{}_proj", 2, 8, 8, 4),
}
"""Names of the projections; neurons; features, rows of the queries, of keys and values each."""


class TestHeads:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("name", SEPARATE)
    def test_separate_projections(self, name, attention):
        pattern, neurons, repeat, queries, keys = SEPARATE[name]
        parts = ("value", "query", "key") if name == "bert" else ("v", "q", "k")
        graph = traced(name, attention)
        for layer, site in enumerate(heads_of(graph)):
            value, query, key = (pattern.format(layer, part) for part in parts)
            assert (site.name, site.neurons) == (value, neurons)
            assert site.producers == (value, query, key)
            assert len(site.readers) == 1
            assert (site.readers[0].start, site.readers[0].repeat) == (0, repeat)
            assert site.columns == (Span(f"{site.readers[0].module}.weight", 1, 0, repeat),)
            weights = {(s.tensor, s.dim, s.start, s.repeat) for s in site.rows}
            assert weights >= {
                (f"{value}.weight", 0, 0, keys),
                (f"{query}.weight", 0, 0, queries),
                (f"{key}.weight", 0, 0, keys),
            }
            with_bias = name in ("vit", "bert", "qwen2")
            assert len(weights) == (6 if with_bias else 3)
        assert len(heads_of(graph)) == 2

    def test_fused_and_transposed(self):
        site = heads_of(traced("gpt2"))[1]
        name = "transformer.h.1.attn.c_attn"
        assert (site.name, site.neurons) == (name, 4)
        assert site.producers == (name,)
        assert site.readers == (Reader("transformer.h.1.attn.c_proj", -1, 0, 4),)
        assert site.columns == (Span("transformer.h.1.attn.c_proj.weight", 0, 0, 4),)
        starts = (0, 16, 32)
        assert set(site.rows) == {
            *(Span(f"{name}.weight", 1, start, 4) for start in starts),
            *(Span(f"{name}.bias", 0, start, 4) for start in starts),
        }

    def test_fused_with_shared_keys(self):
        site = heads_of(traced("phi3"))[0]
        name = "model.layers.0.self_attn.qkv_proj"
        assert (site.neurons, site.readers[0].repeat) == (2, 8)
        assert site.rows == tuple(
            Span(f"{name}.weight", 0, start, repeat) for start, repeat in ((0, 8), (16, 4), (24, 4))
        )

    def test_windows_are_pieces_of_a_sample(self):
        sites = heads_of(traced("swin"))
        assert [(s.neurons, s.readers[0].repeat) for s in sites] == [(2, 4)] * 2 + [(4, 4)] * 2
        # Two of the four attentions see the whole image in one window.
        assert [s.readers[0].pieces for s in sites] == [True, True, False, False]

    @pytest.mark.usefixtures("device")
    @pytest.mark.parametrize("name", CONFIGS)
    def test_rows_make_their_features(self, name):
        model = transformer(name)
        inputs = Inputs(kwargs=here(batch(name)))
        # What the first attention reads does not depend on a later one.
        assert_rows_make_their_features(model, heads_of(trace(model, inputs))[0], inputs)

    @pytest.mark.usefixtures("device")
    @pytest.mark.parametrize("name", CONFIGS)
    def test_a_masked_head_is_one_without_values(self, name):
        model = transformer(name)
        inputs = Inputs(kwargs=here(batch(name)))
        graph = trace(model, inputs)
        site = heads_of(graph)[-1]
        mask = torch.ones(site.neurons, dtype=torch.bool)
        mask[1] = False
        masks = Slice.whole(graph).masks() | {site.name: mask}
        silent = copy.deepcopy(model)
        spans = [span for span in site.rows if span.tensor.startswith(site.name)]
        if len(site.producers) == 1:
            last = max(span.start for span in spans)
            spans = [span for span in spans if span.start == last]
        with torch.no_grad():
            for span in spans:
                rows = here(span.indices(torch.tensor([1])))
                silent.get_parameter(span.tensor).index_fill_(span.dim, rows, 0)
            with Slice(graph, masks).applied(model):
                masked = inputs.run(model).logits
            torch.testing.assert_close(masked, inputs.run(silent).logits, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(masked, inputs.run(model).logits, atol=1e-3)


LAYOUTS = {
    "by head": (4, 3, {"fused": ((0, 9),)}),
    "by group": (2, 6, {"fused": ((0, 12),)}),
    "blocks": (2, 6, {"fused": ((0, 6), (12, 3), (18, 3))}),
    "keys and values": (4, 3, {"queries": ((0, 3),), "pairs": ((0, 3), (12, 3))}),
    "biased": (4, 3, {"queries": ((0, 3),), "pairs": ((0, 3), (12, 3)), "bias": ((0, 1),)}),
    "keys are values": (4, 3, {"queries": ((0, 3),), "one": ((0, 3),)}),
}


class TestModelsThatNobodyListed:
    @pytest.mark.parametrize("kind", LAYOUTS)
    def test_layouts(self, kind):
        neurons, repeat, layouts = LAYOUTS[kind]
        model = Attending(kind).eval()
        inputs = Inputs((images(2, 5, 10),))
        (site,) = heads_of(trace(model, inputs))
        assert (site.neurons, site.readers) == (neurons, (Reader("project", -1, 0, repeat),))
        expected = {
            Span(f"{name}.{tensor}", 0, start, repeat)
            for name, spans in layouts.items()
            for start, repeat in spans
            for tensor in ("weight", "bias")
        }
        assert set(site.rows) == expected
        assert_rows_make_their_features(model, site, inputs)

    @pytest.mark.parametrize(
        ("kind", "options", "reason"),
        [
            ("talking", {}, "does not divide into heads"),
            ("reversed", {}, "does not divide into heads"),
            ("by head", {"heads": 1, "size": 12}, "does not divide into heads"),
            ("blocks", {"groups": 1}, "does not divide into heads"),
            ("twice", {}, "is used more than once"),
        ],
    )
    def test_what_fails_the_check_is_left_out(self, kind, options, reason):
        graph = trace(Attending(kind, **options).eval(), Inputs((images(2, 5, 10),)))
        sources = {"fused"} if "fused" in graph.skipped else {"queries", "pairs"}
        for source in sources:
            assert reason in graph.skipped[source]
        assert "inner" in {site.name for site in graph.sites}
        assert not heads_of(graph)

    def test_one_token_shows_no_heads(self):
        graph = trace(Attending("by head").eval(), Inputs((images(2, 1, 10),)))
        assert "queries and keys change nothing in the batch" in graph.skipped["fused"]

    def test_a_pooling_by_weights_is_no_attention(self):
        graph = trace(Pooled(), Inputs((images(2, 5, 12),)))
        assert [(site.name, site.neurons) for site in graph.sites] == [("first", 8), ("inner", 6)]
        assert "does not divide into heads" in graph.skipped["weigh"]

    def test_shared_layers(self):
        model = Attending("keys are values").eval()
        model.one.weight = model.queries.weight
        graph = trace(model, Inputs((images(2, 5, 10),)))
        assert "shares a parameter with another module" in graph.skipped["one"]

    def test_torchs_own_attention_is_left_out(self):
        graph = trace(Encoder().eval(), Inputs((images(2, 6, 5),)))
        assert not heads_of(graph)
        for layer in (0, 1):
            name = f"layers.layers.{layer}.self_attn"
            assert "without a call of its output projection" in graph.skipped[name]
            site = graph.site(f"layers.layers.{layer}.linear1")
            assert not graph.groups[site.group].kept_whole


class TestOtherSites:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
    def test_a_gated_mlp_is_one_site(self, name, attention):
        graph = traced(name, attention)
        site = graph.site("model.layers.1.mlp.gate_proj")
        assert site.producers == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
        assert site.readers == (Reader("model.layers.1.mlp.down_proj", -1),)
        assert {span.tensor for span in site.rows} == {f"{p}.weight" for p in site.producers}
        assert graph.groups[site.group].kept_whole == ""

    def test_an_mlp_of_transposed_layers(self):
        graph = traced("gpt2")
        site = graph.site("transformer.h.0.mlp.c_fc")
        assert site.neurons == 64
        assert set(site.rows) == {
            Span("transformer.h.0.mlp.c_fc.weight", 1),
            Span("transformer.h.0.mlp.c_fc.bias", 0),
        }
        assert site.columns == (Span("transformer.h.0.mlp.c_proj.weight", 0),)
        assert graph.groups[site.group].kept_whole == ""

    @pytest.mark.parametrize("name", ["vit", "bert", "swin"])
    def test_plain_mlps_may_lose_neurons(self, name):
        graph = traced(name)
        inner = [s for s in graph.sites if s.name.endswith(("fc1", "intermediate.dense"))]
        assert len(inner) == (4 if name == "swin" else 2)
        assert not any(graph.groups[site.group].kept_whole for site in inner)

    def test_one_set_of_keys_still_leaves_the_mlps(self):
        graph = traced("llama", num_key_value_heads=1)
        assert not heads_of(graph)
        assert "does not divide into heads" in graph.skipped["model.layers.0.self_attn.v_proj"]
        assert graph.site("model.layers.0.mlp.gate_proj").neurons == 24


class TestGraph:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_attention_implementations_give_the_same_graph(self, name):
        assert traced(name, "sdpa") == traced(name, "eager")

    @pytest.mark.parametrize("name", CONFIGS)
    def test_sites_are_in_the_order_of_the_forward_pass(self, name):
        graph = traced(name)
        order = {layer.name: i for i, layer in enumerate(graph.layers)}
        first = [order[s.readers[0].module] for s in graph.sites if not s.readers[0].routed]
        assert first == sorted(first)
        for site in graph.sites:
            assert site.name in graph.groups[site.group].sites

    @pytest.mark.parametrize("name", CONFIGS)
    def test_round_trip(self, name):
        graph = traced(name)
        assert Graph.from_json(json.loads(json.dumps(graph.to_json()))) == graph

    @pytest.mark.parametrize("name", CONFIGS)
    def test_the_model_is_left_alone(self, name):
        model = transformer(name).train()
        before = copy.deepcopy(model.state_dict())
        trace(model, Inputs(kwargs=batch(name)))
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert all(module.training for module in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert "forward" not in module.__dict__

    def test_a_search_without_end_is_given_up(self):
        """Experts in which torch-pruning finds ever new indices."""
        torch.manual_seed(0)
        config = LLAMA | {"head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
        config = library().GptOssConfig(**config)
        model = library().GptOssForSequenceClassification(config)
        graph = trace(model, Inputs(kwargs=batch("llama")))
        assert "the search does not end" in graph.skipped["model.layers.0.self_attn.o_proj"]
        assert [site.neurons for site in heads_of(graph)] == [2, 2]

    def test_heads_are_found_where_torch_pruning_fails(self, monkeypatch):
        def fail(self, model, **options):
            model.register_forward_hook(lambda *_: None)
            raise KeyError("an operator it does not know")

        monkeypatch.setattr("torch_pruning.DependencyGraph.build_dependency", fail)
        model = transformer("llama")
        graph = trace(model, Inputs(kwargs=batch("llama")))
        assert not model._forward_hooks
        assert [site.name for site in graph.sites] == [
            f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)
        ]
        reason = "torch-pruning cannot trace the model: KeyError: 'an operator it does not know'"
        assert graph.skipped["model.layers.0.mlp.up_proj"] == reason
        assert "model.layers.0.self_attn.q_proj" not in graph.skipped
