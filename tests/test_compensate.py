"""Compensation: the closed form, and what it does for networks that lost neurons."""

import copy
import resource

import pytest
import torch
from helpers import here, same_bits
from models import IMAGES, images, settled
from torch import Tensor, nn
from transformer_models import transformer

import neusemslice as nss
from neusemslice import Slice
from neusemslice.maintain import plan
from neusemslice.maintain.capture import capture
from neusemslice.maintain.compensate import RIDGE

pytestmark = pytest.mark.usefixtures("device")

X = images(96, 1, 8, 8, seed=3)
CALIBRATION = [(x, torch.arange(len(x)) % 4) for x in X.split(32)]


def made(name: str) -> tuple[nn.Module, nss.SemanticSlicing]:
    torch.manual_seed(1)
    model = settled(IMAGES[name](), 1, 8, 8)
    return model, nss.slice(nss.profile(model, CALIBRATION))


def error(model: nn.Module, whole: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x) - whole.eval()(x)).square().mean())


class TestValues:
    def test_a_linear_layer_is_ridge_regression(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).eval()
        data = [(x, torch.arange(40) % 3) for x in torch.randn(4, 40, 5)]
        here(model)
        slicing = nss.slice(nss.profile(model, data))
        small = nss.restructure(model, slicing, calibration=data, keep=0.5)
        model.cpu(), small.model.cpu()
        left = small.kept.mask("0")
        x = torch.cat([x for x, _ in data])
        with torch.no_grad():
            h = model[:2](x).double()[:, left]
            t = model(x).double()
        old = model[2].weight.detach().double()[:, left].t()
        h, mean_h = h - h.mean(0), h.mean(0)
        n, f = h.shape
        ridge = RIDGE * float((h**2).mean()) * torch.eye(f, dtype=torch.float64)
        # Stacked least squares, which the normal equations are not: [h; sqrt(n r)] W = [t; …].
        root = (n * ridge).sqrt()
        stacked = torch.cat([h, root]), torch.cat([t - t.mean(0), root @ old])
        fitted = torch.linalg.lstsq(*stacked).solution
        torch.testing.assert_close(small.model[2].weight.double().t(), fitted, rtol=1e-4, atol=1e-5)
        offset = t.mean(0) - mean_h @ fitted
        torch.testing.assert_close(small.model[2].bias.double(), offset, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_a_wide_layer_takes_little_more_than_its_gram(self):
        """4,096 features left of 4,608 solve their own normal equations, in two such matrices."""
        torch.manual_seed(0)
        width, left = 4608, 4096
        model = nn.Sequential(nn.Linear(48, width), nn.Tanh(), nn.Linear(width, 8)).eval()
        data = list(torch.randn(8, 640, 48))
        labelled = [(x[:8], torch.arange(8)) for x in data[:1]]
        graph = nss.profile(model, labelled, metrics=("avg",)).graph
        kept = Slice(graph, {"0": torch.arange(width) < left})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        small = nss.restructure(model, kept, calibration=data)
        taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert taken < 3.5 * 8 * left**2
        refit = small.report.refits["2"]
        assert refit.after < 0.1 * refit.before
        # The gradient of the ridge regression is zero at what was found.
        x = torch.cat(data)
        with torch.no_grad():
            h = model[:2](x).double()[:, :left]
            t = model(x).double()
            new, old = small.model[2].weight.double().t(), model[2].weight.double().t()[:left]
            h, t = h - h.mean(0), t - t.mean(0)
            ridge = RIDGE * float(h.square().mean())
            pull = h.t() @ (t - h @ new) / len(x) - ridge * (new - old)
            unsolved = h.t() @ (t - h @ old) / len(x)
        assert float(pull.norm() / unsolved.norm()) < 1e-3

    @pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
    @pytest.mark.parametrize("layer", ["conv1d", "conv2d"])
    def test_copies_of_neurons_fold_without_a_trace(self, layer, padding_mode):
        """Half of the neurons repeat the others, so nothing is lost, borders included."""
        torch.manual_seed(0)
        conv, shape = {
            "conv1d": (nn.Conv1d, (64, 2, 15)),
            "conv2d": (nn.Conv2d, (32, 2, 9, 7)),
        }[layer]
        options = {"stride": 2, "padding": 2, "dilation": 2, "padding_mode": padding_mode}
        first, second = conv(2, 6, 3), conv(6, 4, 3, **options)
        with torch.no_grad():
            first.weight[3:] = first.weight[:3]
            first.bias[3:] = first.bias[:3]
        pool = nn.AdaptiveAvgPool1d(1) if layer == "conv1d" else nn.AdaptiveAvgPool2d(1)
        model = nn.Sequential(
            first, nn.ReLU(), second, nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 3)
        )
        data = [(torch.randn(shape), torch.arange(shape[0]) % 3)]
        graph = nss.profile(model, data).graph
        half = Slice(graph, {"0": torch.arange(6) < 3, "2": torch.ones(4, dtype=torch.bool)})
        cut = nss.restructure(model, half, calibration=data, compensate=False)
        small = nss.restructure(model, half, calibration=data)
        x = torch.randn(shape)
        # Not exactly, because ridge pulls towards the weights as they were.
        assert error(small.model, model, x) < 0.01 * error(cut.model, model, x)
        assert small.report.refits["2"].before > 0.01
        assert small.report.refits["2"].after < 1e-3

    def test_a_bias_that_there_is_no_room_for_goes_into_the_batch_norm(self):
        model, slicing = made("residual")
        assert model.conv2.bias is None
        small = nss.restructure(model, slicing, calibration=CALIBRATION, keep=0.5)
        mean = small.model.bn2.running_mean
        kept = small.kept.mask("conv2")
        assert not torch.equal(mean, model.bn2.running_mean[kept])
        assert torch.equal(small.model.bn2.running_var, model.bn2.running_var[kept])


class TestNetworks:
    @pytest.mark.pretended
    @pytest.mark.parametrize("name", [name for name in IMAGES if name != "grouped"])
    def test_is_nearer_to_the_whole_on_unseen_samples(self, name):
        model, slicing = made(name)
        before = copy.deepcopy(model.state_dict())
        kept = plan(model, slicing, calibration=CALIBRATION, keep=0.5).kept
        cut, small = (
            nss.restructure(model, kept, calibration=CALIBRATION, compensate=c)
            for c in (False, True)
        )
        unseen = here(images(64, 1, 8, 8, seed=4))
        assert error(small.model, model, unseen) < 0.7 * error(cut.model, model, unseen)
        assert small.report.refits
        for name, refit in small.report.refits.items():
            assert refit.after <= refit.before, name
        assert not cut.report.refits
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key

    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
    def test_transformers(self, name):
        model = transformer(name)
        tokens = torch.randint(0, 50, (48, 12))
        mask = torch.ones_like(tokens)
        mask[::3, 8:] = 0
        data = [
            {"input_ids": t, "attention_mask": m, "labels": torch.arange(16) % 3}
            for t, m in zip(tokens.split(16), mask.split(16), strict=True)
        ]
        slicing = nss.slice(nss.profile(model, data))
        cut, small = (
            nss.restructure(model, slicing, calibration=data, keep=0.5, compensate=c)
            for c in (False, True)
        )

        def off(model_: nn.Module) -> float:
            batch = here({"input_ids": tokens, "attention_mask": mask})
            with torch.no_grad():
                return float((model_(**batch).logits - model(**batch).logits).square().mean())

        assert off(small.model) < 0.7 * off(cut.model)

    def test_same_bits_twice(self):
        model, slicing = made("residual")
        one, two = (
            nss.restructure(model, slicing, calibration=CALIBRATION, keep=0.5) for _ in range(2)
        )
        for key, value in one.model.state_dict().items():
            assert same_bits(value, two.model.state_dict()[key]), key

    def test_nothing_is_fitted_where_nothing_went(self):
        model, slicing = made("lenet")
        whole = Slice.whole(slicing.profile.graph)
        result = nss.restructure(model, whole, calibration=CALIBRATION)
        assert result.report.refits == {}
        for key, value in model.state_dict().items():
            assert torch.equal(result.model.state_dict()[key], value), key


class TestRefusals:
    def test_too_few_samples_name_the_layer(self):
        model, slicing = made("lenet")
        before = copy.deepcopy(model.state_dict())
        few = [(X[:8], torch.zeros(8, dtype=torch.int64))]
        with pytest.raises(ValueError, match=r"layer 7 has 48 features, .* 8 rows .*give more"):
            nss.restructure(model, slicing, calibration=few, keep=0.5)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key

    def test_an_iterator_is_refused_before_anything_is_fitted(self):
        model, slicing = made("lenet")
        with pytest.raises(ValueError, match="an iterator is used up after one"):
            nss.restructure(model, slicing, calibration=iter(CALIBRATION), keep=0.5)

    def test_activations_that_are_not_finite_name_the_layer(self):
        model, slicing = made("lenet")
        bad = X.clone()
        bad[40] = torch.inf
        with pytest.raises(ValueError, match=r"layer \d sees activations that are not finite"):
            nss.restructure(model, slicing, calibration=list(bad.split(32)), keep=0.5)


class TestCapture:
    """What a layer's answer is added to, in the ways that sums are written."""

    class Sum(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
            self.last, self.how = nn.Linear(4, 4), how

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = self.dropout(self.norm(self.layer(x)))
            z = self.last(x)  # another branch runs between the answer and the sum
            match self.how:
                case "operator":
                    return y + z
                case "reflected":
                    return z + y
                case "in place":
                    y += z
                    return y
                case "into the stream":
                    return z.add_(y)
                case "function":
                    return torch.add(input=y, other=z)
                case "scaled":
                    return torch.add(y, z, alpha=2)
                case "broadcast":
                    return y + z[:1]
            return y * z

    @pytest.mark.parametrize(
        ("how", "found"),
        [
            ("operator", True),
            ("reflected", True),
            ("in place", True),
            ("into the stream", True),
            ("function", True),
            ("scaled", False),
            ("broadcast", False),
            ("product", False),
        ],
    )
    def test_sums(self, how, found):
        model = self.Sum(how).eval()
        x = torch.randn(3, 4)
        seen = capture(model, "layer", nss.graph.Inputs((x,)))
        with torch.no_grad():
            h = model.first(x)
            assert torch.equal(seen.input, h)
            assert torch.equal(seen.output, model.layer(h))
            assert seen.norm == "norm"
            if found:
                assert seen.stream is not None
                assert torch.equal(seen.stream, model.last(h))
            else:
                assert seen.stream is None
        assert not any(m._forward_hooks for m in model.modules())

    def test_a_layer_that_is_not_called(self):
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model.forward = lambda x: model["a"](x)
        with pytest.raises(RuntimeError, match="does not call its layer b"):
            capture(model, "b", nss.graph.Inputs((torch.zeros(1, 2),)))
