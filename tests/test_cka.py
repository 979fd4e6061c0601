"""Linear CKA between layers, against its formula, at any batch size, and on models."""

import pytest
import torch
from helpers import same_bits
from hypothesis import given
from hypothesis import strategies as st
from models import Mlp, lenet
from torch.utils.data import DataLoader, TensorDataset

from neusemslice import reference
from neusemslice.profiling import LinearCKA, cka


def streamed(layers: dict[str, torch.Tensor], batch: int, group: int = 256) -> torch.Tensor:
    """The values, from batches of a size."""
    found = LinearCKA(group)
    samples = len(next(iter(layers.values())))
    for first in range(0, samples, batch):
        found.update({name: x[first : first + batch] for name, x in layers.items()})
    result = found.compute()
    assert result.sites == tuple(layers)
    assert result.samples == samples
    return result.values


def related(samples: int) -> dict[str, torch.Tensor]:
    """Layers that have something in common."""
    x = torch.randn(samples, 5)
    return {
        "x": x,
        "wide": torch.relu(x @ torch.randn(5, 40)) + 3,
        "narrow": x[:, :1] + 0.5 * torch.randn(samples, 1),
        "other": torch.randn(samples, 7),
    }


@pytest.mark.parametrize("samples", [4, 5, 6, 37])
def test_equals_the_formula(samples):
    layers = related(samples)
    values = streamed(layers, samples)
    for i, x in enumerate(layers.values()):
        for j, y in enumerate(layers.values()):
            # The estimate of a layer with itself is a sum of squares; in the formula, rounding of
            # the terms that cancel is relative to the greatest of them.
            torch.testing.assert_close(values[i, j], reference.cka(x, y), rtol=1e-9, atol=1e-9)
    assert torch.equal(values, values.t())
    assert torch.equal(values.diagonal(), torch.ones(4, dtype=torch.float64))


def test_groups_are_averaged_by_their_samples():
    layers = related(8 + 8 + 11)  # 11: no group of 8 is taken where fewer than 4 would be left
    x, y = layers["x"], layers["wide"]

    def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        parts = zip(a.split([8, 8, 11]), b.split([8, 8, 11]), strict=True)
        return sum(len(p) * reference.unbiased_hsic(p, q) for p, q in parts)

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    torch.testing.assert_close(streamed(layers, 5, group=8)[0, 1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("group", [4, 10, 256])
def test_any_batch_size_gives_the_same_bits(group):
    layers = related(45)
    whole = streamed(layers, 45, group)
    assert whole.isfinite().all()
    for batch in (1, 2, 3, 4, 7, 44):
        assert same_bits(whole, streamed(layers, batch, group))


@given(
    st.integers(4, 12),
    st.integers(0, 3),
    st.integers(1, 5),
    st.sampled_from([0.0, 1e-20, 1.0, 1e6]),
    st.sampled_from([0.0, 1e6]),
)
def test_never_nan_and_within_bounds(samples, features, batch, scale, offset):
    few = torch.randint(-1, 2, (samples, features)).double()  # alike and constant rows among them
    layers = {
        "few": few * scale + offset,
        "x": torch.randn(samples, 2),
        "one": torch.zeros(samples),
    }
    layers["outlier"] = torch.zeros(samples, 3)
    layers["outlier"][samples // 2] = 7.7
    values = streamed(layers, batch, group=4)
    assert values.isfinite().all()
    assert values.abs().max() <= 1
    assert (values[2] == 0).all()
    assert (values[3] == 0).all(), "HSIC leaves out what tells one sample from all others"
    assert ((values.diagonal() == 0) | (values.diagonal() == 1)).all()


def test_constant_features_have_nothing_in_common():
    layers = related(20) | {"constant": torch.full((20, 6), 0.1)}
    values = streamed(layers, 3)
    assert (values[-1] == 0).all()
    assert (values[:, -1] == 0).all()
    assert torch.equal(values[:-1, :-1], streamed(related_of(layers), 3))


def related_of(layers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in layers.items() if name != "constant"}


def test_identical_layers_give_one():
    x = torch.randn(50, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    layers = {
        "x": x,
        "same": x.clone(),
        "rotated": x @ rotation,
        "scaled": 1e-3 * x,
        "moved": x + 1e4,
        "shaped": x.reshape(50, 2, 3),
    }
    values = streamed(layers, 7, group=16)
    # Moving by 1e4 rounds a value of 1 in its twelfth digit.
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-11)
    assert values[0, 1] == 1 or abs(values[0, 1] - 1) < 1e-15


def test_unbiased_where_samples_are_few():
    # 8 samples of 100 features: the biased estimate of unrelated layers is near 1.
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(200):
        layers = {"x": torch.randn(8, 100), "y": torch.randn(8, 100)}
        sums += streamed(layers, 8)
    # The standard deviation of one estimate is below 1 / sqrt(n (n - 3) / 2) = 0.22.
    assert abs(float(sums[0, 1]) / 200) < 4 * 0.22 / 200**0.5


def test_refuses():
    with pytest.raises(ValueError, match="group must be at least 4, got 3"):
        LinearCKA(3)
    found = LinearCKA()
    with pytest.raises(ValueError, match="at least 4 samples are needed, got 0"):
        found.compute()
    with pytest.raises(ValueError, match="at least one layer, got none"):
        found.update({})
    found.update({"x": torch.randn(3, 2), "y": torch.randn(3, 5)})
    with pytest.raises(ValueError, match="at least 4 samples are needed, got 3"):
        found.compute()
    with pytest.raises(ValueError, match=r"layers must be \('x', 'y'\), got \('x',\)"):
        found.update({"x": torch.randn(3, 2)})
    with pytest.raises(ValueError, match="y has 2 samples, but x has 3"):
        found.update({"x": torch.randn(3, 2), "y": torch.randn(2, 5)})
    with pytest.raises(ValueError, match="y has values that are NaN or infinite"):
        found.update({"x": torch.randn(1, 2), "y": torch.full((1, 5), torch.nan)})
    found.update({"x": torch.randn(1, 2), "y": torch.randn(1, 5)})
    assert found.compute().samples == 4, "a refused batch leaves no trace"


def data(samples: int = 30) -> TensorDataset:
    return TensorDataset(torch.randn(samples, 1, 8, 8), torch.randint(0, 4, (samples,)))


class TestModels:
    @pytest.mark.pretended
    @pytest.mark.parametrize("batch", [1, 2, 3, 4, 30])
    def test_equals_the_formula_on_pooled_activations(self, batch, device):
        model, samples = lenet().eval(), data()
        seen = {}
        hooks = [
            model[i].register_forward_pre_hook(
                lambda _, args, i=i: seen.update({i: args[0].detach()})
            )
            for i in (3, 7, 9)
        ]
        model(samples.tensors[0])
        for hook in hooks:
            hook.remove()
        pooled = [seen[3].mean((2, 3)), seen[7].reshape(30, 6, -1).mean(2), seen[9]]
        got = cka(model.to(device), DataLoader(samples, batch))
        assert got.sites == ("0", "3", "7")
        for i, x in enumerate(pooled):
            for j, y in enumerate(pooled):
                # Float32 activations of batches of other sizes differ in their last digits.
                expected = reference.cka(x, y)
                torch.testing.assert_close(got.values[i, j].cpu(), expected, rtol=0, atol=1e-4)

    def test_leaves_the_model_alone(self):
        model = lenet().train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        cka(model, DataLoader(data(), 7), sites=["0", "7"])
        assert model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())

    def test_refuses_what_is_not_finite_and_too_few_samples(self):
        model, x = Mlp(), torch.randn(8, 12)
        loader = DataLoader(TensorDataset(x, torch.zeros(8, dtype=torch.int64)), 3)
        with pytest.raises(ValueError, match="at least 4 samples are needed, got 3"):
            cka(model, [next(iter(loader))])
        with torch.no_grad():
            model.second.weight[0] = torch.inf
        with pytest.raises(ValueError, match=r"cka: activations are NaN or infinite at .*second"):
            cka(model, loader)
        assert not any(m._forward_pre_hooks for m in model.modules())
