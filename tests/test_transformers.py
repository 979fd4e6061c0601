"""Transformers from profile to maintained model: heads among the sites, MLPs that get smaller."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import here
from models import Laid
from torch import nn
from transformer_models import CONFIGS, Encoder, batch, batches, library, transformer

import neusemslice as nss
from neusemslice import reference
from neusemslice.graph import Inputs, trace
from neusemslice.maintain.cutting import TOLERANCE

pytestmark = pytest.mark.usefixtures("device")


def is_head(site):
    return site.readers[0].repeat > 1


def observed(model, module, inputs, labels):
    """In float64: what a module reads, and the gradient of the summed loss by it."""
    model = copy.deepcopy(model).double()
    seen = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    inputs = here({k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    loss = F.cross_entropy(model(**inputs).logits, here(labels), reduction="sum")
    hook.remove()
    return seen[0].detach().cpu(), torch.autograd.grad(loss, seen[0])[0].cpu()


def pooled(x, neurons, mask, samples):
    """Mean over a head's features and the real tokens, [N, C], by plain loops."""
    x = x.reshape(samples, -1, neurons, x.shape[-1] // neurons)
    rows = []
    for n in range(samples):
        real = x[n] if mask is None else x[n][mask[n].bool()]
        rows.append(torch.stack([real[:, c].mean() for c in range(neurons)]))
    return torch.stack(rows)


class TestProfile:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_heads_against_a_direct_computation(self, name):
        model = transformer(name)
        data = batches(name)
        profile = nss.profile(model, [library().BatchEncoding(b) for b in data], ("avg", "taylor"))
        sites = [site for site in profile.graph.sites if is_head(site)]
        assert len(sites) >= 2
        for site in sites:
            means, products, labels = [], [], []
            for b in data:
                inputs = {k: v for k, v in b.items() if k != "labels"}
                x, g = observed(model, site.readers[0].module, inputs, b["labels"])
                mask, samples = b.get("attention_mask"), len(b["labels"])
                means.append(pooled(x, site.neurons, mask, samples))
                products.append(pooled(x * g, site.neurons, mask, samples))
                labels.append(b["labels"])
            y = torch.cat(labels)
            for expected, stats in (
                (reference.class_stats(torch.cat(means), y, 3), profile.activations),
                (reference.class_stats(torch.cat(products), y, 3), profile.contributions),
            ):
                scale = float(expected.mean.abs().max())
                torch.testing.assert_close(
                    stats[site.name].mean.cpu(), expected.mean, rtol=1e-4, atol=2e-5 * scale
                )
            assert profile.activations[site.name].count.tolist() == [5, 5, 5]

    def test_token_labels_and_masks_at_heads(self):
        model = transformer("vit")
        site = next(
            s for s in trace(model, Inputs(kwargs=here(batch("vit")))).sites if s.neurons == 4
        )
        inputs = batch("vit")
        x, _ = observed(model, site.readers[0].module, inputs, torch.zeros(4, dtype=torch.long))
        tokens = x.shape[1]
        heads = x.view(4, tokens, 4, 4).mean(3)
        labels = torch.randint(-1, 3, (4, tokens)).masked_fill(torch.rand(4, tokens) < 0.2, -100)
        labels[labels == -1] = 2
        mask = torch.rand(4, tokens) < 0.6
        profiler = nss.Profiler(model, inputs, sites=[site.name])
        with profiler.batch(labels, mask), torch.no_grad():
            model(**here(inputs))
        kept = labels.masked_fill(~mask, -100).flatten()
        expected = reference.class_stats(heads.flatten(0, 1), kept, 3)
        stats = profiler.profile.activations[site.name]
        torch.testing.assert_close(stats.mean.cpu(), expected.mean, rtol=1e-4, atol=1e-5)
        assert torch.equal(stats.count.cpu(), expected.count)

        profiler = nss.Profiler(model, inputs, sites=[site.name])
        mask[:, 0] = True
        with profiler.batch([0, 1, 1, 2], mask), torch.no_grad():
            model(**here(inputs))
        expected = reference.class_stats(pooled(x, 4, mask, 4), torch.tensor([0, 1, 1, 2]), 3)
        stats = profiler.profile.activations[site.name]
        torch.testing.assert_close(stats.mean.cpu(), expected.mean, rtol=1e-4, atol=1e-5)

    def test_windows_take_neither_masks_nor_token_labels(self):
        model = transformer("swin")
        name = "swin.encoder.layers.0.blocks.0.attention.v_proj"
        profiler = nss.Profiler(model, batch("swin"), sites=[name])
        inputs = batch("swin")
        with pytest.raises(ValueError, match=f"site {name} sees"), profiler.batch([[0] * 64] * 4):
            model(**here(inputs))
        mask = torch.ones(4, 64, dtype=torch.bool)
        with pytest.raises(ValueError, match=f"site {name} sees"), profiler.batch([0] * 4, mask):
            model(**here(inputs))

    def test_samples_laid_end_to_end(self):
        model = here(Laid("in order").eval())
        x, y = torch.randn(4, 5, 12), torch.tensor([0, 1, 1, 2])
        mask = torch.rand(4, 5) < 0.6
        mask[:, 0] = True
        profiler = nss.Profiler(model, x, sites=["first"])
        with profiler.batch(y, mask), torch.no_grad():
            model(here(x))
        hidden = F.relu(model.first(here(x))).detach().double().cpu()
        means = torch.stack([hidden[n][mask[n]].mean(0) for n in range(4)])
        expected = reference.class_stats(means, y, 4)
        stats = profiler.profile.activations["first"]
        torch.testing.assert_close(stats.mean.cpu(), expected.mean, rtol=1e-5, atol=1e-6)

    def test_padding_does_not_count_at_heads(self):
        """More padding on the right of every text changes nothing."""
        model = transformer("bert")
        data = batches("bert")
        longer = [{k: v if k == "labels" else F.pad(v, (0, 4)) for k, v in b.items()} for b in data]
        a, b = (nss.profile(model, d, ("avg", "taylor")) for d in (data, longer))
        for site in a.graph.sites:
            for one, two in ((a.activations, b.activations), (a.contributions, b.contributions)):
                scale = float(one[site.name].mean.abs().max())
                torch.testing.assert_close(
                    one[site.name].mean, two[site.name].mean, rtol=1e-4, atol=1e-5 * scale
                )

    def test_torchs_own_encoder(self):
        model = here(Encoder().eval())
        x, y = torch.randn(6, 7, 5), torch.arange(6) % 3
        profile = nss.profile(model, [(x, y)], ("avg",))
        for stats in profile.activations.values():
            assert stats.count.tolist() == [2, 2, 2]


class TestRestructure:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_mlps_and_attentions_get_smaller(self, name):
        model = transformer(name)
        data = batches(name)
        slicing = nss.slice(nss.profile(model, data))
        graph = slicing.profile.graph
        small = nss.restructure(model, slicing, calibration=data, keep=0.5, compensate=False)
        heads = inner = 0
        for site in graph.sites:
            before, after = small.report.widths[site.name]
            if site.name in small.report.kept_whole:
                assert before == after
                assert not is_head(site)
            else:
                assert after == before // 2
                heads += is_head(site)
                inner += not is_head(site)
        layers = 4 if name == "swin" else 2
        assert heads == layers
        # A gate that shares a layer with what it lets through cannot lose neurons.
        assert inner >= (0 if name == "phi3" else layers)
        inputs = here(batch(name, seed=9))
        with torch.no_grad(), small.kept.applied(model):
            expected = model(**inputs).logits
            torch.testing.assert_close(small.model(**inputs).logits, expected, rtol=1e-3, atol=1e-4)
        assert small.report.difference <= TOLERANCE
        assert small.report.after.parameters < small.report.before.parameters

    def test_the_cut_tensors_are_those_of_mlps_and_attentions(self):
        model = transformer("llama")
        data = batches("llama")
        slicing = nss.slice(nss.profile(model, data))
        small = nss.restructure(model, slicing, calibration=data, keep=0.25, compensate=False)
        shapes = {
            name: list(p.shape)
            for name, p in small.model.named_parameters()
            if p.shape != model.get_parameter(name).shape
        }
        assert shapes == {
            f"model.layers.{i}.{part}_proj.weight": shape
            for i in (0, 1)
            for part, shape in (
                ("mlp.gate", [6, 16]),
                ("mlp.up", [6, 16]),
                ("mlp.down", [16, 6]),
                ("self_attn.q", [8, 16]),
                ("self_attn.k", [4, 16]),
                ("self_attn.v", [4, 16]),
                ("self_attn.o", [16, 8]),
            )
        }


class TestReadapt:
    @pytest.mark.pretended
    @pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
    def test_a_tuned_head_is_its_rows_and_no_others(self, name):
        model = transformer(name)
        data = batches(name)
        graph = trace(model, Inputs(kwargs=here(batch(name))))
        heads = [site.name for site in graph.sites if is_head(site)]
        slicing = nss.slice(nss.profile(model, data, sites=heads))
        options = {"epochs": 1, "weight_decay": 0.1, "validation": None}
        result = nss.readapt(model, slicing, data, budget=0.4, **options)
        assert len(result.tuned) > 0
        expected = {}
        for site in slicing.profile.graph.sites:
            for neuron in result.tuned.mask(site.name).nonzero().flatten().tolist():
                for span in site.rows:
                    own = expected.setdefault(span.tensor, torch.zeros(0, dtype=torch.long))
                    first = span.start + neuron * span.repeat
                    rows = torch.arange(first, first + span.repeat)
                    expected[span.tensor] = torch.cat([own, rows])
        dims = {span.tensor: span.dim for site in graph.sites for span in site.rows}
        # The layer that answers is tuned whole.
        for name in graph.outputs:
            for own_name, parameter in model.get_submodule(name).named_parameters():
                expected[f"{name}.{own_name}"] = torch.arange(len(parameter))
        for key, value in result.model.named_parameters():
            before = model.get_parameter(key)
            changed = (value != before).movedim(dims.get(key, 0), 0)
            changed = changed.reshape(len(changed), -1).any(1).cpu()
            wanted = torch.zeros_like(changed)
            if key in expected:
                wanted[expected[key]] = True
            assert torch.equal(changed & ~wanted, torch.zeros_like(changed)), key
            # Keys have a bias that no softmax sees, so not every row has a gradient; all decay.
            if key in expected and key.endswith("weight"):
                assert torch.equal(changed, wanted), key


class TestExtend:
    def test_new_classes_leave_the_old_answers(self):
        model = transformer("vit", num_labels=6)
        data = batches("vit")
        slicing = nss.slice(nss.profile(model, data))
        new = [b | {"labels": b["labels"] + 3} for b in batches("vit", 2)]
        grown = nss.extend(model, slicing, new, capacity=0.5, epochs=1)
        assert grown.report.unchanged
        graph = slicing.profile.graph
        heads = [grown.frozen.mask(site.name) for site in graph.sites if is_head(site)]
        assert all(0 < int(mask.sum()) < len(mask) for mask in heads)
        inputs = here(batch("vit", seed=5))
        with torch.no_grad(), grown.frozen.applied(model):
            old = model(**inputs).logits
        with torch.no_grad():
            assert torch.equal(grown.model.eval().task("old")(**inputs), old)


class TestSlices:
    def test_save_and_load(self, tmp_path):
        model = transformer("gpt2")
        slicing = nss.slice(nss.profile(model, batches("gpt2")))
        kept = slicing.critical_slice()
        again = nss.Slice.load(kept.save(tmp_path / "slice.safetensors"))
        assert again == kept
        assert again.graph == kept.graph

    def test_what_is_not_in_the_slice_is_masked_at_heads(self):
        model = transformer("llama")
        graph = trace(model, Inputs(kwargs=here(batch("llama"))))
        site = next(s for s in graph.sites if is_head(s))
        masks = nss.Slice.whole(graph).masks() | {site.name: torch.tensor([True, False])}
        seen = []
        reader = model.get_submodule(site.readers[0].module)
        assert isinstance(reader, nn.Linear)
        with nss.Slice(graph, masks).applied(model), torch.no_grad():
            hook = reader.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
            model(**here(batch("llama")))
            hook.remove()
        assert (seen[0][..., :8] != 0).all()
        assert (seen[0][..., 8:] == 0).all()
