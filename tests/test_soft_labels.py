"""Labels that give each sample a share of several classes."""

import pytest
import torch
import torch.nn.functional as F
from helpers import here
from models import Mlp, Tokens, images, settled

import neusemslice as nss
from neusemslice import Profiler, reference

pytestmark = pytest.mark.usefixtures("device")

X = images(19, 12)
SOFT = torch.rand(19, 4, generator=torch.Generator().manual_seed(1))
SOFT[3] = 0  # an ignored sample
SOFT[:, 2] = torch.where(SOFT[:, 2] < 0.5, 0, SOFT[:, 2])  # samples without a share of a class


def made():
    torch.manual_seed(0)
    return settled(Mlp(), 12)


def profiled(batches, metrics=("avg", "taylor")):
    return nss.profile(made(), batches, metrics)


def split(labels, size=7):
    return list(zip(X.split(size), labels.split(size), strict=True))


def assert_close(a, b, rtol=1e-5):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[name], rtol=rtol, atol=1e-6)


def assert_as_the_oracle(stats, expected):
    for name, tensor in stats.tensors().items():
        if name != "nonfinite":
            torch.testing.assert_close(
                tensor.double().cpu(), getattr(expected, name), rtol=1e-5, atol=1e-6
            )


def test_activations_equal_the_oracle():
    hidden = made().first(here(X)).relu().detach().cpu()
    stats = profiled(split(SOFT)).activations["first"]
    assert_as_the_oracle(stats, reference.class_stats(hidden, SOFT, 4))


def test_contributions_equal_the_oracle():
    """Each sample's loss is the cross-entropy with its own shares, summed over the classes."""
    model, products = made(), []
    for x, shares in zip(here(X), here(SOFT), strict=True):
        hidden = model.first(x[None]).relu().detach().requires_grad_()
        logs = model.head(model.second(hidden).relu()).log_softmax(1)
        (gradient,) = torch.autograd.grad(-(shares * logs[0]).sum(), hidden)
        products.append(hidden.detach() * gradient)
    expected = reference.class_stats(torch.cat(products).cpu(), SOFT, 4)
    stats = profiled(split(SOFT)).contributions["first"]
    torch.testing.assert_close(stats.mean.cpu(), expected.mean, rtol=1e-4, atol=1e-6)
    mean_abs = stats.mean_abs.double().cpu()
    torch.testing.assert_close(mean_abs, expected.mean_abs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_hot_labels_equal_class_numbers(dtype):
    hard = torch.arange(19) % 4
    hard[5] = -100
    one_hot = (hard.unsqueeze(1) == torch.arange(4)).to(dtype)
    assert_close(profiled(split(one_hot)), profiled(split(hard)))


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy])
def test_lists_and_arrays(convert):
    assert_close(profiled([(x, convert(y)) for x, y in split(SOFT)]), profiled(split(SOFT)))


def test_a_row_of_zeros_is_an_ignored_sample():
    kept = SOFT.sum(1) > 0
    assert not kept.all()
    assert_close(profiled([(X[kept], SOFT[kept])]), profiled(split(SOFT)))


@pytest.mark.pretended
def test_weights_multiply_the_shares():
    model, weights = made(), torch.rand(19)
    profiler = Profiler(model, X[:2])
    with profiler.batch(SOFT, weights=weights):
        model(here(X))
    hidden = model.first(here(X)).relu().detach().cpu()
    expected = reference.class_stats(hidden, SOFT, 4, weight=weights)
    assert_as_the_oracle(profiler.profile.activations["first"], expected)


@pytest.mark.pretended
def test_tokens_with_a_mask():
    torch.manual_seed(0)
    model, x = settled(Tokens(), 5, 12), images(19, 5, 12)
    mask = torch.rand(19, 5) < 0.6
    profiler = Profiler(model, x[:2], sites=["inner"])
    with profiler.batch(SOFT, mask=mask):
        model(here(x))
    inner = F.gelu(model.inner(model.norm(model.embed(here(x))))).detach().cpu()
    expected = reference.class_stats(inner, SOFT, 4, mask=mask, neuron_dim=-1)
    assert_as_the_oracle(profiler.profile.activations["inner"], expected)


class TestRefusals:
    def test_another_number_of_classes_in_a_later_batch(self):
        batches = [*split(SOFT), (X[:2], torch.rand(2, 5))]
        with pytest.raises(
            ValueError, match=r"batch 3: soft labels must be \[N, 4\], one column .*got \[2, 5\]"
        ):
            profiled(batches)

    @pytest.mark.parametrize("bad", [-0.5, torch.nan, torch.inf])
    def test_shares_that_are_none(self, bad):
        labels = SOFT[:2].clone()
        labels[1, 1] = bad
        with pytest.raises(
            ValueError, match="batch 1: soft labels must be finite and not negative"
        ):
            profiled([(X, SOFT), (X[:2], labels)])

    def test_a_row_for_each_sample(self):
        with pytest.raises(ValueError, match="the batch has 19 labels, but 18 samples at site"):
            profiled([(X[:18], SOFT)])

    def test_more_dimensions(self):
        with pytest.raises(TypeError, match=r"labels must be .*got float32 \[2, 3, 4\]"):
            profiled([(X[:2], torch.rand(2, 3, 4))])

    def test_an_answer_for_each_token(self):
        class ForEachToken(Tokens):
            def forward(self, x):
                x = self.embed(x)
                return self.head(x + self.outer(F.gelu(self.inner(self.norm(x)))))

        model, x = settled(ForEachToken(), 5, 12), images(6, 5, 12)
        for labels in (SOFT[:6], torch.arange(6) % 4):
            with pytest.raises(
                ValueError, match=r"answers \[6, 5, 4\] to labels \[6.*\], .*give the loss"
            ):
                nss.profile(model, [(x, labels)])
