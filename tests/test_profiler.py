"""Observation in one's own loop: tokens, masks, weights, chosen sites, compiled models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import current_device, here
from models import Mlp, Residual, Tokens, images, loader, settled

import neusemslice as nss
from neusemslice import Profiler, reference

pytestmark = pytest.mark.usefixtures("device")

BATCHES = loader(24, shape=(12,))


def profiled(batches=BATCHES, **options):
    torch.manual_seed(0)
    return nss.profile(settled(Mlp(), 12), batches, **options)


def assert_close(a, b, rtol=1e-6):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[name], rtol=rtol, atol=1e-7)


def assert_same_bits(a, b):
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


class TestOwnLoop:
    def run(self, metrics=("avg",)):
        torch.manual_seed(0)
        model = settled(Mlp(), 12)
        with Profiler(model, BATCHES[0][0][:2], metrics) as profiler:
            for x, y in BATCHES:
                with profiler.batch(y):
                    loss = F.cross_entropy(model(here(x)), here(y), reduction="sum")
                    if "taylor" in metrics:
                        loss.backward()
        return profiler.profile

    @pytest.mark.pretended
    @pytest.mark.parametrize("metrics", [("avg",), ("avg", "taylor")])
    def test_equals_the_one_call(self, metrics):
        assert_same_bits(self.run(metrics), profiled(metrics=metrics))

    def test_a_batch_alone_brings_its_hooks_and_takes_them_away(self):
        model = settled(Mlp(), 12)
        profiler = Profiler(model, images(2, 12))
        with profiler.batch([0, 1]):
            model(here(images(2, 12)))
        assert profiler.profile.samples.tolist() == [1, 1, 0, 0]
        with pytest.raises(RuntimeError, match="stop"), profiler.batch([0, 1]):
            raise RuntimeError("stop")
        assert not any(m._forward_pre_hooks for m in model.modules())

    def test_forward_passes_outside_a_batch_are_not_observed(self):
        model = settled(Mlp(), 12)
        with Profiler(model, images(2, 12)) as profiler:
            model(here(images(5, 12)))
        assert profiler.profile.samples.sum() == 0

    def test_taylor_needs_its_backward_pass_and_gradients(self):
        model = settled(Mlp(), 12)
        with Profiler(model, images(2, 12), ("taylor",)) as profiler:
            with (
                pytest.raises(ValueError, match="needs a backward pass within the batch's block"),
                profiler.batch([0, 1]),
            ):
                model(here(images(2, 12)))
            with (
                torch.no_grad(),
                pytest.raises(ValueError, match="needs gradients, but head, second ran without"),
                profiler.batch([0, 1]),
            ):
                model(here(images(2, 12)))

    def test_weights(self):
        model = settled(Mlp(), 12)
        x, y, w = images(9, 12), torch.arange(9) % 4, torch.rand(9)
        profiler = Profiler(model, x[:2])
        with profiler.batch(y, weights=w):
            model(here(x))
        hidden = model.cpu().first(x).relu().detach()
        expected = reference.class_stats(hidden, y, 4, weight=w)
        torch.testing.assert_close(
            profiler.profile.activations["first"].mean.cpu(), expected.mean, rtol=1e-6, atol=1e-8
        )
        with (
            pytest.raises(ValueError, match=r"weights must have shape \[9\], got \[3\]"),
            profiler.batch(y, weights=w[:3]),
        ):
            pass


class TestSites:
    def test_are_listed_before_the_run(self):
        profiler = Profiler(here(Residual()), images(2, 1, 8, 8))
        assert profiler.graph.sites[0].name == "stem"

    def test_chosen_by_pattern(self):
        profile = profiled(sites=["sec*"])
        assert set(profile.activations) == {"second"}
        assert_same_bits_of(profile, profiled(), "second")
        slicing = nss.slice(profile)
        assert set(slicing.critical) == {"second"}

    def test_a_group_that_is_only_partly_observed_is_kept_whole(self):
        model = settled(Residual(), 1, 8, 8)
        batches = loader(24)
        slicing = nss.slice(nss.profile(model, batches, sites=["conv*", "inner"]))
        small = nss.restructure(model, slicing, calibration=batches, keep=0.5, compensate=False)
        assert small.report.widths == {"conv1": (8, 4), "conv2": (8, 8), "inner": (10, 5)}

    def test_a_pattern_that_matches_nothing(self):
        with pytest.raises(
            ValueError, match=r"no site matches 'third\*'; the model has first, second"
        ):
            profiled(sites=["first", "third*"])


def assert_same_bits_of(a, b, site):
    for name, tensor in a.activations[site].tensors().items():
        assert torch.equal(tensor, b.activations[site].tensors()[name]), name


class TestTokens:
    def model(self):
        torch.manual_seed(0)
        return settled(Tokens(), 5, 12)

    def inner(self, model, x):
        h = model.embed(here(x))
        return F.gelu(model.inner(model.norm(h))).detach().cpu()

    @pytest.mark.pretended
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_does_not_change_the_statistics(self, side):
        model, x, y = self.model(), images(6, 5, 12), torch.arange(6) % 4
        profiler = Profiler(model, x[:2], sites=["inner"])
        with profiler.batch(y):
            model(here(x))
        padding = torch.full((6, 3, 12), 9.0)
        parts = [x, padding] if side == "right" else [padding, x]
        real = torch.ones(6, 5, dtype=torch.bool), torch.zeros(6, 3, dtype=torch.bool)
        mask = torch.cat(real if side == "right" else real[::-1], 1)
        padded = Profiler(model, x[:2], sites=["inner"])
        with padded.batch(y, mask=mask):
            model(here(torch.cat(parts, 1)))
        assert_close(profiler.profile, padded.profile, rtol=1e-5)

    @pytest.mark.pretended
    def test_a_label_per_token(self):
        model, x = self.model(), images(6, 5, 12)
        y = torch.arange(30).view(6, 5) % 4
        y[0, 1] = -100
        profiler = Profiler(model, x[:2], sites=["inner"])
        mask = torch.ones(6, 5, dtype=torch.bool)
        mask[2, 3] = False
        with profiler.batch(y, mask=mask):
            model(here(x))
        expected = reference.class_stats(
            self.inner(model, x).flatten(0, 1), y.masked_fill(~mask, -100).flatten(), 4
        )
        got = profiler.profile.activations["inner"]
        torch.testing.assert_close(got.count.cpu(), expected.count)
        torch.testing.assert_close(got.mean.cpu(), expected.mean, rtol=1e-5, atol=1e-7)

    def test_an_attention_mask_in_a_mapping_is_used(self):
        class Masked(Tokens):
            def forward(self, x, attention_mask=None):
                return super().forward(x)

        torch.manual_seed(0)
        model = settled(Masked(), 5, 12)
        x, y, mask = images(6, 5, 12), torch.arange(6) % 4, torch.rand(6, 5) > 0.5
        mask[:, 0] = True
        batch = {"x": x, "attention_mask": mask.long(), "labels": y}
        profile = nss.profile(model, [batch], sites=["inner"])
        expected = reference.class_stats(self.inner(model, x), y, 4, mask=mask, neuron_dim=-1)
        got = profile.activations["inner"]
        torch.testing.assert_close(got.mean.cpu(), expected.mean, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(
        ("labels", "mask", "message"),
        [
            (
                torch.zeros(6, 4, dtype=torch.int64),
                None,
                "labels are of 6 x 4 tokens, but site inner",
            ),
            (torch.zeros(6, dtype=torch.int64), torch.ones(6, 4), r"mask must be bool or integer"),
            (torch.zeros(6, dtype=torch.int64), torch.ones(6, 4).bool(), "mask is of 6 x 4 tokens"),
            (
                torch.zeros(6, dtype=torch.int64),
                torch.ones(5, 5).bool(),
                r"mask must be bool \[N, T\]",
            ),
        ],
    )
    def test_what_does_not_fit_names_the_site(self, labels, mask, message):
        model, x = self.model(), images(6, 5, 12)
        profiler = Profiler(model, x[:2], sites=["inner"])
        with pytest.raises((ValueError, TypeError), match=message), profiler.batch(labels, mask):
            model(here(x))


class TestCompiled:
    def test_statistics_are_operators_in_the_graph(self):
        model, x, y = settled(Residual(), 1, 8, 8), images(8, 1, 8, 8), torch.arange(8) % 4
        eager = Profiler(model, x[:2])
        with eager.batch(y):
            model(here(x))
        with Profiler(model, x[:2]) as profiler:
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            for _ in range(2):
                with profiler.batch(y):
                    compiled(here(x))
        total = eager.profile + eager.profile
        assert_close(profiler.profile, total)
        torch.compiler.reset()

    def test_a_model_compiled_before_is_observed_too(self):
        model, x, y = settled(Mlp(), 12), images(8, 12), torch.arange(8) % 4
        model.compile(backend="aot_eager")
        model(here(x))
        profiler = Profiler(model, x[:2])
        with profiler.batch(y):
            model(here(x))
        assert profiler.profile.samples.tolist() == [2, 2, 2, 2]
        torch.compiler.reset()

    def test_autocast(self):
        model, x, y = settled(Mlp(), 12), images(8, 12), torch.arange(8) % 4
        profiler = Profiler(model, x[:2])
        with profiler.batch(y), torch.autocast(current_device().type, dtype=torch.bfloat16):
            model(here(x))
        plain = Profiler(model, x[:2])
        with plain.batch(y):
            model(here(x))
        a = profiler.profile.activations["first"].mean
        b = plain.profile.activations["first"].mean
        assert (a - b).abs().max() < 2e-2 * b.abs().max()


class TestMerge:
    def test_shards_equal_the_whole(self):
        parts = [profiled(BATCHES[:1]), profiled(BATCHES[1:3]), profiled(BATCHES[3:])]
        total = copy.deepcopy(parts[0])
        for part in parts[1:]:
            total.merge(part)
        assert_close(total, profiled())
        assert_same_bits(parts[0] + parts[1] + parts[2], total)

    def test_state_dict_round_trip(self):
        one, other = profiled(), profiled(BATCHES[:1])
        other.load_state_dict(one.state_dict())
        assert_same_bits(one, other)
        with pytest.raises(ValueError, match="statistics lack activations/first/count"):
            other.load_state_dict({})

    def test_refuses_another_model_or_other_classes(self):
        one = profiled()
        with pytest.raises(ValueError, match="differ in their models"):
            one.merge(nss.profile(settled(Mlp(hidden=9), 12), BATCHES))
        with pytest.raises(ValueError, match="differ in their metrics"):
            one.merge(profiled(metrics=("avg",)))
        with pytest.raises(ValueError, match="differ in their classes"):
            one.merge(profiled(class_names=["a", "b", "c", "d"]))
        with pytest.raises(ValueError, match="differ in their sites"):
            one.merge(profiled(sites=["first"]))
