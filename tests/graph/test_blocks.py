"""Graphs of models without values equal those that are found by trying."""

import copy
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers import here
from models import Mlp, images
from torch import nn
from transformer_models import (
    CONFIGS,
    CONVNETS,
    LLAMA,
    Attending,
    batch,
    batches,
    convnet,
    library,
    transformer,
)

import neusemslice as nss
from neusemslice.graph import Inputs, cut, trace
from neusemslice.maintain.cost import sliced_cost
from neusemslice.maintain.cutting import TOLERANCE
from neusemslice.slicing import Slice


def on_meta(model):
    return copy.deepcopy(model).to("meta")


def removable(graph):
    """The sites that can lose neurons, apart from how their groups are numbered."""
    return [replace(s, group=0) for s in graph.sites if not graph.groups[s.group].kept_whole]


class TestEqualsTracing:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("name", [*CONFIGS, "mistral", "qwen3-moe"])
    def test_transformers(self, name, attention):
        model, inputs = transformer(name, attention), Inputs(kwargs=batch(name))
        traced, built = trace(model, inputs), trace(on_meta(model), inputs)
        assert removable(built) == removable(traced)
        assert len(removable(built)) == len(built.sites)
        assert built.layers == traced.layers
        assert built.outputs == traced.outputs
        assert (built.fingerprint, built.num_outputs) == (traced.fingerprint, traced.num_outputs)

    @pytest.mark.parametrize("name", CONVNETS)
    def test_the_insides_of_blocks_of_convolutions(self, name):
        model, inputs = convnet(name), Inputs(kwargs=batch(name))
        traced, built = trace(model, inputs), trace(on_meta(model), inputs)
        alone = [s for s in traced.sites if len(traced.groups[s.group].sites) == 1]
        inside = [s for s in removable(traced) if s.name in {one.name for one in alone}]
        built_sites = {site.name: replace(site, group=0) for site in built.sites}
        assert len(built_sites) == 4
        for site in inside:
            assert built_sites.pop(site.name, site) == site
        assert not built_sites
        assert built.layers == traced.layers

    def test_sites_know_their_groups(self):
        graph = trace(on_meta(transformer("bert")), Inputs(kwargs=batch("bert")))
        for site in graph.sites:
            assert graph.groups[site.group].sites == (site.name,)

    @pytest.mark.usefixtures("device")
    @pytest.mark.parametrize("name", ["llama", "gpt2", "swin"])
    def test_what_is_cut_by_it_is_cut_right(self, name):
        """A slice of the graph without values, cut from the model with values."""
        model, inputs = transformer(name), Inputs(kwargs=here(batch(name)))
        graph = trace(on_meta(model), inputs)
        masks = {s.name: torch.arange(s.neurons) % 2 == 1 for s in graph.sites}
        small = cut(model, graph, masks)
        with torch.no_grad(), Slice(graph, masks).applied(model):
            expected = inputs.run(model).logits
            torch.testing.assert_close(inputs.run(small).logits, expected, rtol=1e-4, atol=1e-5)


class TestLeftOut:
    def test_an_attention_that_nobody_listed(self):
        model = Attending("by head").eval()
        graph = trace(on_meta(model), Inputs((images(2, 5, 10),)))
        assert not removable(graph)
        assert graph.skipped["fused"].startswith("Attending is none of the attentions whose heads")

    def test_residual_streams(self):
        graph = trace(on_meta(transformer("llama")), Inputs(kwargs=batch("llama")))
        reason = "its neurons do not reach one layer element by element"
        assert graph.skipped["model.layers.0.self_attn.o_proj"] == reason

    def test_one_set_of_keys(self):
        model = transformer("llama", num_key_value_heads=1)
        graph = trace(on_meta(model), Inputs(kwargs=batch("llama")))
        assert "does not divide into heads" in graph.skipped["model.layers.0.self_attn.v_proj"]

    def test_a_layer_that_two_others_read(self):
        class Forked(Mlp):
            def forward(self, x):
                hidden = self.first(x.flatten(1)).relu()
                return self.head(self.second(hidden).relu() + hidden)

        with pytest.raises(ValueError, match="first is left out: its neurons do not reach one"):
            trace(on_meta(Forked()), Inputs((images(2, 12),)))

    def test_something_of_a_fixed_size_on_the_way(self, caplog):
        class Shifted(Mlp):
            def forward(self, x):
                hidden = self.first(x.flatten(1)).relu() + torch.ones(16)
                return self.head(self.second(hidden).relu())

        graph = trace(on_meta(Shifted()), Inputs((images(2, 12),)))
        assert "does not run without some of them" in graph.groups[0].kept_whole
        assert not caplog.records
        assert [site.name for site in removable(graph)] == ["second"]

    def test_a_parameter_on_the_way(self):
        class Scaled(Mlp):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(16))

            def forward(self, x):
                hidden = self.scale * self.first(x.flatten(1)).relu()
                return self.head(self.second(hidden).relu())

        graph = trace(on_meta(Scaled()), Inputs((images(2, 12),)))
        assert [site.name for site in graph.sites] == ["second"]

    def test_nothing_to_slice(self):
        with pytest.raises(ValueError, match="there is nothing to slice"):
            trace(on_meta(nn.Sequential(nn.Linear(12, 4))), Inputs((images(2, 12),)))


class TestScale:
    def test_a_plan_for_7_billion_parameters(self):
        """32 layers of Llama, of which nothing is loaded."""
        config = library().LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=32000,
            pad_token_id=0,
        )
        with torch.device("meta"):
            model = library().LlamaForCausalLM(config)
        tokens = torch.ones(2, 128, dtype=torch.long)
        begin = time.perf_counter()
        graph = trace(model, Inputs(kwargs={"input_ids": tokens, "attention_mask": tokens}))
        half = {s.name: torch.arange(s.neurons) < s.neurons // 2 for s in graph.sites}
        whole = sliced_cost(model, graph, Slice.whole(graph))
        left = sliced_cost(model, graph, Slice(graph, half))
        print(f"planned in {time.perf_counter() - begin:.1f} s")
        assert [site.neurons for site in graph.sites] == [32, 11008] * 32
        assert whole[0] == sum(p.numel() for p in model.parameters())
        per_layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
        assert whole == (
            32 * (per_layer + 2 * 4096) + 4096 + 2 * 32000 * 4096,
            128 * (32 * per_layer + 32000 * 4096),
        )
        assert left[1] == 128 * (32 * per_layer // 2 + 32000 * 4096)
        small = cut(model, graph, half)
        assert sum(p.numel() for p in small.parameters()) == left[0]
        assert next(small.parameters()).is_meta

    def test_groups_of_query_heads(self):
        settings = LLAMA | {"hidden_size": 512, "num_attention_heads": 32, "head_dim": 128}
        config = library().LlamaConfig(**settings | {"num_key_value_heads": 8})
        with torch.device("meta"):
            model = library().LlamaForCausalLM(config)
        graph = trace(model, Inputs(kwargs={"input_ids": torch.ones(1, 8, dtype=torch.long)}))
        site = graph.site("model.layers.0.self_attn.v_proj")
        assert (site.neurons, site.readers[0].repeat) == (8, 512)
        assert {(s.tensor.split(".")[-2], s.repeat) for s in site.rows} == {
            ("v_proj", 128),
            ("q_proj", 512),
            ("k_proj", 128),
        }

    @pytest.mark.usefixtures("device")
    def test_large_models_are_read_by_structure(self, monkeypatch):
        monkeypatch.setattr(sys.modules[trace.__module__], "LARGE", 1000)
        model, inputs = transformer("gpt2"), Inputs(kwargs=here(batch("gpt2")))
        before = copy.deepcopy(model.state_dict())
        assert trace(model, inputs) == trace(on_meta(model), inputs)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    @pytest.mark.usefixtures("device")
    @pytest.mark.parametrize("name", ["llama", "mixtral"])
    def test_from_profile_to_smaller_model(self, name, monkeypatch):
        monkeypatch.setattr(sys.modules[trace.__module__], "LARGE", 1000)
        model, data = transformer(name), batches(name)
        slicing = nss.slice(nss.profile(model, data, ("avg", "taylor")))
        small = nss.restructure(model, slicing, calibration=data, params=0.8, compensate=False)
        assert small.report.difference <= TOLERANCE
        assert not small.report.kept_whole
        assert small.report.after.parameters <= 0.8 * small.report.before.parameters
