"""A delta turns the parent into the child and back, bit for bit, and no other model at all."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import IMAGES, Mlp, settled
from torch import nn

from neusemslice.maintain import Delta

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def bits(model):
    return {
        name: tensor.reshape(-1).view(torch.uint8).clone()
        for name, tensor in model.state_dict().items()
    }


def assert_same_bits(model, expected):
    found = bits(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def changed(model, share=0.3, seed=1):
    """A copy with some rows of each parameter and buffer changed."""
    child = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in child.state_dict().values():
            rows = tensor.view(-1) if tensor.ndim == 0 else tensor
            chosen = torch.rand(len(rows), generator=generator) < share
            rows[chosen] = rows[chosen] * 3 + 1
    return child


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IMAGES)
def test_apply_then_remove_gives_the_parent_bit_for_bit(name, dtype, tmp_path, device):
    parent = settled(IMAGES[name](), 1, 8, 8, device=device).to(dtype)
    child = changed(parent)
    before, after = bits(parent), bits(child)
    path = Delta.between(parent, child).save(tmp_path / "delta.safetensors")
    delta = Delta.load(path)
    delta.apply(parent)
    assert_same_bits(parent, after)
    delta.remove(parent)
    assert_same_bits(parent, before)
    delta.remove(child)
    assert_same_bits(child, before)


@given(st.integers(0, 2), st.floats(0, 1), st.integers(0, 99))
def test_any_rows_along_any_dimension(dim, share, seed):
    parent = nn.Conv2d(3, 5, 3)
    child = copy.deepcopy(parent)
    chosen = torch.rand(parent.weight.shape[dim], generator=torch.manual_seed(seed)) < share
    with torch.no_grad():
        child.weight.movedim(dim, 0)[chosen] += 1
    delta = Delta.between(parent, child, {"weight": dim})
    found = delta.rows.get("weight", torch.zeros(0, dtype=torch.int64))
    assert torch.equal(found, chosen.nonzero().flatten())
    delta.apply(parent)
    assert torch.equal(parent.weight, child.weight)


def test_not_a_number_and_signed_zero_are_bits_like_others():
    parent, child = Mlp(), Mlp()
    child.load_state_dict(parent.state_dict())
    with torch.no_grad():
        parent.first.bias[:2] = torch.tensor([0.0, torch.nan])
        child.first.bias[:2] = torch.tensor([-0.0, torch.nan])
    before, after = bits(parent), bits(child)
    delta = Delta.between(parent, child)
    assert delta.rows["first.bias"].tolist() == [0]
    delta.apply(parent)
    assert_same_bits(parent, after)
    delta.remove(parent)
    assert_same_bits(parent, before)


def test_size_follows_the_rows(tmp_path):
    parent = nn.Linear(4096, 512)
    sizes = []
    for rows in (5, 50, 500):
        child = copy.deepcopy(parent)
        with torch.no_grad():
            child.weight[:rows] += 1
        delta = Delta.between(parent, child)
        assert delta.nbytes == rows * (4096 * 4 + 8)
        sizes.append(delta.save(tmp_path / f"{rows}").stat().st_size)
        assert sizes[-1] - delta.nbytes < 2048
    assert sizes[0] < 0.011 * parent.weight.nbytes


def test_equal_models_have_nothing_between_them(tmp_path):
    parent = Mlp()
    delta = Delta.load(Delta.between(parent, copy.deepcopy(parent)).save(tmp_path / "none"))
    before = bits(parent)
    delta.apply(parent)
    delta.remove(parent)
    assert_same_bits(parent, before)
    assert delta.nbytes == 0


def test_tied_tensors_are_changed_once():
    parent = Mlp()
    parent.second.weight = nn.Parameter(torch.randn(16, 16))
    parent.extra = parent.second
    child = changed(parent)
    after = bits(child)
    Delta.between(parent, child).apply(parent)
    assert_same_bits(parent, after)
    assert parent.extra is parent.second


class TestRefusals:
    @pytest.fixture
    def parent(self):
        return settled(IMAGES["residual"](), 1, 8, 8)

    @pytest.fixture
    def delta(self, parent):
        return Delta.between(parent, changed(parent))

    def refused(self, model, act, message):
        before = bits(model)
        with pytest.raises(ValueError, match=message):
            act(model)
        assert_same_bits(model, before)

    def test_applied_twice_and_removed_without(self, parent, delta):
        self.refused(parent, delta.remove, r"Delta\.remove: the delta is not applied")
        delta.apply(parent)
        self.refused(parent, delta.apply, r"Delta\.apply: the delta is applied already")

    def test_a_model_of_another_structure(self, delta):
        self.refused(Mlp(), delta.apply, "belongs to another model: it was made for structure")

    def test_a_model_of_other_weights(self, parent, delta):
        with torch.no_grad():
            parent.conv2.weight[int(delta.rows["conv2.weight"][0])] += 1e-3
        for act in (delta.apply, delta.remove):
            self.refused(parent, act, r"belongs to another model: its rows of conv2\.weight have")

    def test_weights_outside_its_rows_may_differ(self, parent, delta):
        rows = set(range(8)) - set(delta.rows["conv2.weight"].tolist())
        with torch.no_grad():
            parent.conv2.weight[rows.pop()] += 1e-3
        delta.apply(parent)

    def test_another_dtype(self, parent, delta):
        self.refused(parent.bfloat16(), delta.apply, r"weight must be torch\.float32, got torch\.b")

    def test_models_that_cannot_be_compared(self, parent):
        with pytest.raises(ValueError, match="must be of one structure"):
            Delta.between(parent, Mlp())
        with pytest.raises(ValueError, match=r"stem\.weight must be of one dtype"):
            Delta.between(parent, copy.deepcopy(parent).half())

    @pytest.mark.parametrize("keep", [0, 9, 400, -1])
    def test_a_truncated_file(self, delta, keep, tmp_path):
        path = delta.save(tmp_path / "delta")
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match="delta is not a whole safetensors file"):
            Delta.load(path)

    def test_another_file(self, parent, tmp_path):
        from neusemslice import _files

        path = _files.write(tmp_path / "model", "model", parent.state_dict(), {})
        with pytest.raises(ValueError, match="holds a model, expected a delta"):
            Delta.load(path)
        with pytest.raises(FileNotFoundError, match="gone: no such file"):
            Delta.load(tmp_path / "gone")

    def test_a_changed_bit_is_found_before_anything_is_written(self, parent, delta, tmp_path):
        path = delta.save(tmp_path / "delta")
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        for at in range(start, len(whole), (len(whole) - start) // 40):
            raw = bytearray(whole)
            raw[at] ^= 1
            path.write_bytes(raw)
            self.refused(parent, Delta.load(path).apply, r"is damaged in its|to another model")

    def test_a_write_that_fails_half_way_is_taken_back(self, parent, delta, monkeypatch):
        real, calls = torch.Tensor.index_copy_, []

        def failing(self, *args):
            calls.append(self)
            if len(calls) == 3:
                raise MemoryError("injected")
            return real(self, *args)

        before = bits(parent)
        monkeypatch.setattr(torch.Tensor, "index_copy_", failing)
        with pytest.raises(MemoryError, match="injected"):
            delta.apply(parent)
        assert_same_bits(parent, before)
        assert len(calls) > 3
