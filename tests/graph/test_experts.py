"""Fused experts: what they own, what is seen of them, and how one is left out."""

import copy

import pytest
import torch
from helpers import here
from torch import nn
from transformer_models import batch, batches, transformer

import neusemslice as nss
from neusemslice import reference
from neusemslice.graph import Group, Inputs, Reader, Span, cut, multiply_adds, shares, trace
from neusemslice.maintain.cost import sliced_cost
from neusemslice.maintain.cutting import TOLERANCE, check_pruned, prune
from neusemslice.slicing import Slice

pytestmark = pytest.mark.usefixtures("device")

EXPERTS = "model.layers.{}.mlp.experts"


def given():
    return Inputs(kwargs=here(batch("mixtral")))


def made(**changes):
    model = transformer("mixtral", **changes)
    return model, trace(model, given())


def only(graph, layer, experts):
    """A slice with these experts of a layer, and all else."""
    site = graph.site(EXPERTS.format(layer))
    mask = torch.zeros(site.neurons, dtype=torch.bool)
    mask[experts] = True
    return Slice(graph, Slice.whole(graph).masks() | {site.name: mask})


def routed(model, inputs, layer):
    """By hand, in float64: the weight of each expert for each token, [N, T, E]."""
    model = copy.deepcopy(model).double()
    gate = model.get_submodule(f"model.layers.{layer}.mlp.gate")
    seen = []
    hook = gate.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    with torch.no_grad():
        model(**here(inputs))
    hook.remove()
    chances = (seen[0] @ gate.weight.detach().T).softmax(-1).cpu()
    best = chances.argsort(-1, descending=True)[:, :2]
    weights = torch.zeros_like(chances)
    for token, chosen in enumerate(best):
        weights[token, chosen] = chances[token, chosen] / chances[token, chosen].sum()
    return weights.view(len(inputs["input_ids"]), -1, chances.shape[-1])


class TestGraph:
    def test_an_expert_owns_its_row_of_the_router_and_its_weights(self):
        _, graph = made()
        site = graph.site(EXPERTS.format(1))
        gate = "model.layers.1.mlp.gate"
        assert (site.neurons, site.producers) == (4, (gate,))
        assert site.readers == (Reader(site.name, -1, pieces=True, routed=True),)
        assert site.rows == (
            Span(f"{gate}.weight", 0),
            Span(f"{site.name}.gate_up_proj", 0),
            Span(f"{site.name}.down_proj", 0),
        )
        assert {count.module for count in site.counts} == {gate, site.name}
        assert graph.groups[site.group] == Group((site.name,), least=2)
        assert site.name not in graph.skipped

    def test_they_lie_between_the_attentions(self):
        _, graph = made()
        names = [site.name.split(".")[2:] for site in graph.sites]
        assert names == [
            ["0", "self_attn", "v_proj"],
            ["0", "mlp", "experts"],
            ["1", "self_attn", "v_proj"],
            ["1", "mlp", "experts"],
        ]

    @pytest.mark.parametrize("kind", ["grouped_mm", "batched_mm"])
    def test_implementations_give_the_same_graph(self, kind):
        assert made(experts_implementation=kind)[1] == made()[1]

    def test_experts_that_nobody_chooses_are_left_out(self, monkeypatch):
        model = transformer("mixtral")
        gate = model.model.layers[0].mlp.gate
        monkeypatch.setattr(
            gate, "forward", lambda x: tuple(t.clone() for t in type(gate).forward(gate, x))
        )

        def passed_on(self, hidden):
            _, weights, index = self.gate(hidden.flatten(0, 1))
            return self.experts(hidden.flatten(0, 1), index + 0, weights * 1).view_as(hidden)

        block = model.model.layers[0].mlp
        monkeypatch.setattr(block, "forward", passed_on.__get__(block))
        graph = trace(model, given())
        assert "no module chooses among its experts" in graph.skipped[EXPERTS.format(0)]
        assert graph.site(EXPERTS.format(1)).neurons == 4


class TestProfile:
    def test_statistics_against_a_direct_computation(self):
        model = transformer("mixtral")
        data = batches("mixtral")
        profile = nss.profile(model, data)
        for layer in (0, 1):
            means, labels = [], []
            for b in data:
                inputs = {k: v for k, v in b.items() if k != "labels"}
                weights = routed(model, inputs, layer)
                for own, mask in zip(weights, inputs["attention_mask"].bool(), strict=True):
                    means.append(own[mask].mean(0))
                labels.append(b["labels"])
            expected = reference.class_stats(torch.stack(means), torch.cat(labels), 3)
            found = profile.activations[EXPERTS.format(layer)]
            torch.testing.assert_close(found.mean.cpu(), expected.mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.count.cpu(), expected.count)

    def test_contributions_are_those_of_the_experts_weights(self):
        """The gradient of an expert's weight: by central differences of what the layer adds."""
        model = transformer("mixtral").double()
        inputs = here({k: v[:1] for k, v in batch("mixtral").items()})
        label = here(torch.tensor([1]))
        profile = nss.profile(model, [inputs | {"labels": label}], ("taylor",))
        site = EXPERTS.format(1)
        real = int(inputs["attention_mask"].sum())
        found = profile.contributions[site].mean[1]
        module = model.get_submodule(site)

        def loss(expert, factor):
            def scaled(_, args):
                hidden, index, weights = args
                return hidden, index, torch.where(index == expert, weights * factor, weights)

            handle = module.register_forward_pre_hook(scaled)
            with torch.no_grad():
                answer = nn.functional.cross_entropy(model(**inputs).logits, label)
            handle.remove()
            return float(answer)

        for expert in range(4):
            # Not closer, because routers and norms compute in float32.
            slope = (loss(expert, 1.01) - loss(expert, 0.99)) / 0.02
            assert float(found[expert]) * real == pytest.approx(slope, rel=1e-3, abs=1e-5)

    def test_observing_changes_no_answer(self):
        model = transformer("mixtral")
        inputs = here(batch("mixtral"))
        plain = model(**inputs).logits
        with nss.Profiler(model, inputs, ("avg", "taylor")).batch([0, 1, 2, 0]):
            observed = model(**inputs).logits
            nn.functional.cross_entropy(observed, here(torch.tensor([0, 1, 2, 0]))).backward()
        assert torch.equal(plain, observed)

    def test_shares(self):
        index, weights = torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
        x = torch.zeros(2, 5)
        expected = torch.tensor([[0.3, 0, 0.7, 0], [0, 0.6, 0, 0.4]])
        every, args, _ = shares((x, index, weights), {}, 4)
        assert torch.equal(every, expected)
        assert torch.equal(args[2], weights)
        named = {"top_k_index": index, "top_k_weights": weights}
        every, args, kwargs = shares((x,), named, 4)
        assert torch.equal(every, expected)
        assert len(args) == 1
        assert torch.equal(kwargs["top_k_weights"], weights)


class TestMasking:
    def test_the_router_chooses_among_the_others(self):
        """As if the router gave the masked expert no chance."""
        model, graph = made()
        silent = copy.deepcopy(model)
        gate = silent.model.layers[0].mlp.gate
        own = type(gate).forward

        def without(x):
            logits = (x.reshape(-1, x.shape[-1]) @ gate.weight.T).clone()
            logits[:, 3] = -torch.inf
            weights, index = logits.softmax(-1).topk(2)
            return logits, weights / weights.sum(-1, keepdim=True), index

        gate.forward = without
        with torch.no_grad():
            expected = given().run(silent).logits
            with only(graph, 0, [0, 1, 2]).applied(model):
                masked = given().run(model).logits
            torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(masked, given().run(model).logits, atol=1e-3)
        gate = model.model.layers[0].mlp.gate
        assert gate.forward.__func__ is own
        assert (gate.top_k, gate.num_experts, len(gate.weight)) == (2, 4, 4)
        assert not gate._forward_hooks

    @pytest.mark.parametrize("experts", [[3], []])
    def test_fewer_than_the_router_chooses(self, experts):
        model, graph = made()
        seen = []
        module = model.get_submodule(EXPERTS.format(0))
        with only(graph, 0, experts).applied(model), torch.no_grad():
            hook = module.register_forward_pre_hook(lambda _, x: seen.append(x))
            given().run(model)
            hook.remove()
        every, _, _ = shares(seen[0], {}, 4)
        expected = here(torch.zeros(4))
        expected[experts] = 1
        torch.testing.assert_close(every, expected.expand_as(every))

    def test_gradients_reach_the_routers_rows(self):
        model, graph = made()
        with only(graph, 0, [0, 2]).applied(model):
            given().run(model).logits.sum().backward()
        rows = model.model.layers[0].mlp.gate.weight.grad.abs().sum(1) > 0
        assert rows.tolist() == [True, False, True, False]
        assert isinstance(model.model.layers[0].mlp.gate.weight, nn.Parameter)


class TestRemoval:
    @pytest.mark.parametrize("kind", ["eager", "grouped_mm", "batched_mm"])
    @pytest.mark.parametrize("experts", [[0, 2, 3], [1, 2]])
    def test_pruned_equals_masked(self, experts, kind):
        model, graph = made(experts_implementation=kind)
        kept = only(graph, 1, experts)
        small = prune(model, kept)
        assert check_pruned(model, small, kept, given()) <= TOLERANCE
        block = small.model.layers[1].mlp
        assert block.experts.gate_up_proj.shape == (len(experts), 48, 16)
        assert block.experts.down_proj.shape == (len(experts), 16, 24)
        assert block.gate.weight.shape == (len(experts), 16)
        assert (block.gate.num_experts, block.experts.num_experts) == (len(experts),) * 2
        assert torch.equal(
            block.experts.down_proj, model.model.layers[1].mlp.experts.down_proj[experts]
        )

    def test_multiply_adds_are_those_of_the_experts_that_a_token_has(self):
        model, graph = made()
        tokens, weights = 7, 2 * (48 * 16 + 16 * 24)
        assert graph.expert_macs == 2 * tokens * weights
        kept = only(graph, 0, [0, 2])
        planned = sliced_cost(model, graph, kept)[1]
        assert (
            planned == multiply_adds(prune(model, kept), given()) == multiply_adds(model, given())
        )

    def test_another_expert_than_said_is_noticed(self):
        model, graph = made()
        kept = only(graph, 0, [0, 1, 2])
        wrong = cut(model, graph, only(graph, 0, [1, 2, 3]).masks())
        with pytest.raises(RuntimeError, match=f"first difference is at site {EXPERTS.format(0)}"):
            check_pruned(model, wrong, kept, given())

    def test_fewer_than_each_token_has_are_refused(self):
        model, graph = made()
        before = copy.deepcopy(model.state_dict())
        kept = only(graph, 0, [2])
        with pytest.raises(ValueError, match=r"experts must keep at least 2 neurons.*1 would be"):
            nss.restructure(model, kept, calibration=[batch("mixtral")], compensate=False)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_a_target_leaves_enough_for_each_token(self):
        model = transformer("mixtral")
        slicing = nss.slice(nss.profile(model, batches("mixtral")))
        data = batches("mixtral")
        small = nss.restructure(model, slicing, calibration=data, keep=0.1, compensate=False)
        assert small.report.widths[EXPERTS.format(0)] == (4, 2)
        assert small.report.widths["model.layers.0.self_attn.v_proj"] == (2, 1)


class TestMaintenance:
    @pytest.mark.pretended
    def test_a_tuned_expert_is_its_shares_and_no_others(self):
        model = transformer("mixtral")
        data = batches("mixtral")
        slicing = nss.slice(nss.profile(model, data, sites=["*experts"]))
        fitted = nss.readapt(model, slicing, data, budget=0.4, epochs=1, validation=None)
        assert len(fitted.tuned) > 0
        for site in slicing.profile.graph.sites:
            tuned = fitted.tuned.mask(site.name)
            for span in site.rows:
                own = [m.get_parameter(span.tensor) for m in (model, fitted.model)]
                changed = (own[0] != own[1]).flatten(1).any(1).cpu()
                assert not (changed & ~tuned).any(), span.tensor

    @pytest.mark.pretended
    def test_new_classes_leave_the_experts_whole(self):
        model = transformer("mixtral", num_labels=6)
        slicing = nss.slice(nss.profile(model, batches("mixtral")))
        new = [b | {"labels": b["labels"] + 3} for b in batches("mixtral", 2)]
        grown = nss.extend(model, slicing, new, capacity=0.5, epochs=1)
        assert grown.report.unchanged
        assert grown.frozen.mask(EXPERTS.format(0)).all()
        assert 0 < grown.report.free_neurons < 0.5

    def test_deeplift_is_refused(self):
        model = transformer("mixtral")
        data, baseline = batches("mixtral"), torch.zeros(1, 7, dtype=torch.long)
        with pytest.raises(NotImplementedError, match=r"topk in model\.layers\.0\.mlp\.gate"):
            nss.profile(model, data, ("deeplift",), baseline=baseline)
