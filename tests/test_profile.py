"""A profile against sums over all activations at once, and what the profiler promises."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import here
from models import IMAGES, Mlp, Reused, loader, settled
from torch import nn

import neusemslice as nss
from neusemslice import reference
from neusemslice.profiling import Profile

pytestmark = pytest.mark.usefixtures("device")

BATCHES = loader()
VECTORS = loader(shape=(12,))


def everything(model, batches):
    """Inputs of every layer over all batches at once, and the gradients of the summed loss."""
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    inputs = {}

    def hook(module, args):
        args[0].requires_grad_()
        if not args[0].is_leaf:
            args[0].retain_grad()
        inputs[module] = args[0]

    named = dict(model.named_modules())
    layers = [m for m in named.values() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_pre_hook(hook) for m in layers]
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {name: inputs[m] for name, m in named.items() if m in inputs}, y


@pytest.mark.pretended
@pytest.mark.parametrize("name", IMAGES)
def test_equals_all_activations_at_once(name):
    model = settled(IMAGES[name](), 1, 8, 8)
    profile = nss.profile(model, BATCHES, metrics=("avg", "var", "taylor"))
    tensors, y = everything(copy.deepcopy(model).cpu(), BATCHES)
    assert profile.graph.sites
    for site in profile.graph.sites:
        reader = site.readers[0]
        x = tensors[reader.module]
        dim = 1 if x.ndim == 4 else -1
        span = slice(reader.start, reader.start + site.neurons * reader.repeat)
        a, g = (t.movedim(dim, 1)[:, span].detach() for t in (x, x.grad))
        a, g = (t.reshape(len(y), site.neurons, -1) for t in (a, g))
        expected = reference.class_stats(a, y, 4)
        stats = profile.activations[site.name]
        torch.testing.assert_close(stats.mean.cpu(), expected.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.m2.cpu(), expected.m2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stats.max.cpu().double(), expected.max, rtol=1e-5, atol=1e-6)
        contribution = reference.class_stats((a * g).mean(2), y, 4)
        got = profile.contributions[site.name]
        scale = contribution.mean_abs.max()
        torch.testing.assert_close(got.mean.cpu(), contribution.mean, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(
            got.mean_abs.cpu().double(), contribution.mean_abs, rtol=1e-4, atol=1e-5 * scale
        )


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_stream_equals_one_batch_in_float64(dtype, rtol):
    """The state of a stream of ragged batches, against all activations at once."""
    model = settled(Mlp(), 12).to(dtype)
    batches = [(x.to(dtype), y) for x, y in VECTORS]
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    hidden = {"first": model.first(here(x)).relu()}
    hidden["second"] = model.second(hidden["first"]).relu()
    profile = nss.profile(model, batches, ("avg", "var"))
    for name, a in hidden.items():
        expected = reference.class_stats(a.detach().cpu(), y, 4)
        for statistic, tensor in profile.activations[name].tensors().items():
            if statistic != "nonfinite":
                torch.testing.assert_close(
                    tensor.double().cpu(), getattr(expected, statistic), rtol=rtol, atol=rtol * 0.1
                )


def test_a_mean_far_from_zero():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(5))
        model[0].bias.fill_(10_000)
    here(model)
    x, y = torch.randn(4000, 5), torch.arange(4000) % 2
    profile = nss.profile(model, zip(x.split(64), y.split(64), strict=True), ("var",))
    a = model[0](here(x)).detach().double().cpu()
    expected = torch.stack([a[y == k].var(0, correction=0) for k in range(2)])
    found = profile.activations["0"].variance().cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_an_absent_class_and_one_of_a_single_sample():
    model, x = settled(Mlp(), 12), torch.randn(3, 12)
    profile = nss.profile(model, [(x, [0, 2, 0])])
    stats = profile.activations["first"]
    assert profile.samples.tolist() == [2, 0, 1, 0]
    hidden = model.first(here(x)).relu().detach()
    torch.testing.assert_close(stats.mean[2].float(), hidden[1])
    assert (stats.variance()[1:] == 0).all()
    assert (stats.mean[[1, 3]] == 0).all()
    assert (stats.max[[1, 3]] == -torch.inf).all()


def test_any_batch_split_gives_the_same():
    model = settled(IMAGES["residual"](), 1, 8, 8)
    x, y = torch.cat([b[0] for b in BATCHES]), torch.cat([b[1] for b in BATCHES])
    one = nss.profile(model, [(x, y)])
    many = nss.profile(model, list(zip(x.split(5), y.split(5), strict=True)))
    for site in one.activations:
        for name, tensor in one.activations[site].tensors().items():
            other = many.activations[site].tensors()[name]
            torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)


class TestIgnoredSamples:
    def test_do_not_count(self):
        x, y = torch.randn(6, 12), torch.tensor([0, 1, -100, 2, -100, 3])
        model = settled(Mlp(), 12)
        some = nss.profile(model, [(x, y)])
        kept = y >= 0
        only = nss.profile(model, [(x[kept], y[kept])])
        assert some.samples.tolist() == [1, 1, 1, 1]
        for site, stats in some.activations.items():
            torch.testing.assert_close(stats.mean, only.activations[site].mean)
            torch.testing.assert_close(
                some.contributions[site].mean_abs, only.contributions[site].mean_abs
            )


class TestModelIsLeftAlone:
    @pytest.mark.parametrize("metrics", [("avg",), ("taylor",)])
    def test_tensors_modes_flags_hooks_and_gradients(self, metrics):
        model = settled(IMAGES["lenet"](), 1, 8, 8).train()
        model[1].eval()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 7)
        frozen = next(model.parameters())
        frozen.requires_grad_(False)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        nss.profile(model, BATCHES, metrics)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert all((p.grad == 7).all() for p in model.parameters())
        assert not frozen.requires_grad
        assert model.training
        assert not model[1].training
        assert not any(m._forward_pre_hooks for m in model.modules())

    def test_after_an_error_too(self):
        model = settled(Mlp(), 12).train()
        with pytest.raises(ValueError, match="labels"):
            nss.profile(model, [*VECTORS, (torch.randn(2, 12), torch.tensor([0, 9]))])
        assert model.training
        assert not any(m._forward_pre_hooks for m in model.modules())


class TestRefusals:
    def test_metrics(self):
        with pytest.raises(ValueError, match=r"profile: metrics must be among .*got \('sum',\)"):
            nss.profile(Mlp(), VECTORS, ("sum",))
        with pytest.raises(ValueError, match="metrics must be among"):
            nss.profile(Mlp(), VECTORS, ())

    def test_a_loader_that_yields_nothing(self):
        with pytest.raises(ValueError, match="profile: the loader yielded no batch"):
            nss.profile(Mlp(), [])

    @pytest.mark.parametrize(
        ("labels", "error", "message"),
        [
            (
                torch.tensor([0.0, 1.0]),
                TypeError,
                r"batch 0: labels must be integers \[N\] or \[N, T\], or .*, got float32 \[2\]",
            ),
            (
                torch.tensor([[0], [1]]),
                ValueError,
                r"the labels are of 2 x 1 tokens, but site first sees \[2, 12\]|sees \[2, 16\]",
            ),
            (torch.tensor([0, 4]), ValueError, r"labels must lie in \[0, 4\).*got 4 at index 1"),
            (
                torch.tensor([0, 1, 2]),
                ValueError,
                "the batch has 3 labels, but 2 samples at site first",
            ),
        ],
    )
    def test_labels(self, labels, error, message):
        with pytest.raises(error, match=message):
            nss.profile(settled(Mlp(), 12), [(torch.randn(2, 12), labels)])

    def test_batches_of_no_known_form(self):
        with pytest.raises(TypeError, match=r"batch 0 must be .*got Tensor"):
            nss.profile(Mlp(), [torch.randn(2, 12)])
        with pytest.raises(
            TypeError, match=r"batch 0 has no key 'labels' or 'label', only \['x'\]"
        ):
            nss.profile(Mlp(), [{"x": torch.randn(2, 12)}])

    def test_class_names(self):
        with pytest.raises(ValueError, match="class_names must be 4 names, got 2"):
            nss.profile(Mlp(), VECTORS, class_names=["a", "b"])


class TestNonfinite:
    def test_is_counted_per_site(self):
        model = settled(Mlp(), 12)
        with torch.no_grad():
            model.first.bias[3] = torch.inf
        with pytest.warns(RuntimeWarning, match=r"left out of the statistics of first \(24\)"):
            profile = nss.profile(model, VECTORS, ("avg",))
        counts = profile.nonfinite()
        assert counts["first"] == 24
        assert profile.activations["first"].nonfinite[3] == 24


class TestFile:
    def test_round_trip(self, tmp_path):
        profile = nss.profile(settled(Reused(), 12), VECTORS, class_names=["a", "b", "c", "ü"])
        loaded = Profile.load(profile.save(tmp_path / "p.safetensors"))
        assert (loaded.graph, loaded.class_names, loaded.metrics) == (
            profile.graph,
            profile.class_names,
            profile.metrics,
        )
        for part in ("activations", "contributions"):
            for site, stats in getattr(profile, part).items():
                for name, tensor in stats.tensors().items():
                    assert torch.equal(getattr(loaded, part)[site].tensors()[name], tensor.cpu())

    def test_a_tensor_of_another_shape_is_refused(self, tmp_path):
        from neusemslice import _files

        profile = nss.profile(settled(Mlp(), 12), VECTORS, ("avg",))
        tensors, content = profile.to_file()
        tensors["activations/first/mean"] = torch.zeros(4, 3, dtype=torch.float64)
        path = _files.write(tmp_path / "p", "profile", tensors, content)
        with pytest.raises(
            ValueError,
            match=r"p is damaged: activations/first/mean must be .*\[4, 16\], got",
        ):
            Profile.load(path)


def test_a_custom_loss_and_class_count():
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(12, 6), nn.Linear(6, 1)

        def forward(self, x):
            return self.head(self.first(x).relu())

    with pytest.raises(ValueError, match="of 5 classes is not defined for a model with 1 outputs"):
        nss.profile(Regression(), VECTORS, num_classes=5)
    profile = nss.profile(
        Regression(),
        VECTORS,
        num_classes=5,
        loss=lambda output, labels: (output[:, 0] - labels).square(),
    )
    assert profile.num_classes == 5
    assert profile.samples.tolist() == [6, 6, 6, 6, 0]
    assert (profile.contributions["first"].mean_abs[:4] > 0).any()
