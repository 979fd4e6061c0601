"""Every form of batch and label that loaders give leads to the same bits."""

from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from models import Mlp, images, loader, settled
from torch import nn
from transformer_models import library

import neusemslice as nss
from neusemslice.graph import Inputs

BATCHES = loader(shape=(12,))


class Pair(nn.Module):
    """Adds its two inputs up, given as a tuple, and answers as an Mlp."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, pair, scale=None):
        left, right = pair
        return self.mlp((left + right["x"]) * (1 if scale is None else scale))


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Record:
    labels: torch.Tensor
    x: torch.Tensor


def profiled(batches, **options):
    torch.manual_seed(0)
    return nss.profile(settled(Mlp(), 12), batches, **options)


def assert_same_bits(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def read_only(y):
    array = y.numpy().copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.Tensor.int,
        lambda y: list(y),
        lambda y: list(y.numpy()),
        lambda y: y.numpy().astype(np.int32),
        lambda y: y.numpy().astype(np.uint8),
        read_only,
    ],
    ids=["list", "int64", "int32 tensor", "tensors", "scalars", "int32", "uint8", "read-only"],
)
@pytest.mark.filterwarnings("error")
def test_labels_of_any_type_give_the_same_bits(convert):
    assert_same_bits(profiled([(x, convert(y)) for x, y in BATCHES]), profiled(BATCHES))


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: [x, y],
        Named,
        lambda x, y: {"x": x, "labels": y},
        lambda x, y: {"label": y, "x": x},
        lambda x, y: UserDict(x=x, labels=y),
        lambda x, y: library().BatchEncoding({"x": x, "labels": y}),
        lambda x, y: Record(y, x),
        lambda x, y: (library().BatchEncoding({"x": x}), y),
        lambda x, y: ({"x": x}, y.tolist()),
    ],
    ids=[
        "list",
        "named tuple",
        "labels",
        "label",
        "UserDict",
        "BatchEncoding",
        "dataclass",
        "BatchEncoding, labels",
        "dict, labels",
    ],
)
def test_batches_of_any_form_give_the_same_bits(form):
    assert_same_bits(profiled([form(x, y) for x, y in BATCHES]), profiled(BATCHES))


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: x,
        lambda x, y: (x,),
        lambda x, y: {"x": x},
        lambda x, y: library().BatchEncoding({"x": x}),
    ],
    ids=["tensor", "tuple", "dict", "BatchEncoding"],
)
def test_labels_from_a_callable(form):
    answers = iter([y for _, y in BATCHES])
    got = profiled([form(x, y) for x, y in BATCHES], labels=lambda batch: next(answers))
    assert_same_bits(got, profiled(BATCHES))


def test_a_callable_sees_the_batch_as_the_loader_gave_it():
    seen = []

    def labels(batch):
        seen.append(batch)
        return batch.labels

    records = [Record(y, x) for x, y in BATCHES]
    assert_same_bits(profiled(records, labels=labels), profiled(BATCHES))
    assert all(a is b for a, b in zip(seen, records, strict=True))


def test_nested_inputs():
    torch.manual_seed(0)
    model = Pair().eval()
    scale = torch.tensor(2.0)
    got = nss.profile(model, [((x, {"x": x}), scale, y) for x, y in BATCHES])
    plain = nss.profile(model.mlp, [(4 * x, y) for x, y in BATCHES])
    for name, stats in plain.activations.items():
        torch.testing.assert_close(got.activations[f"mlp.{name}"].mean, stats.mean)


class TestInputs:
    """What nesting must survive on its way to another device, or to a smaller batch."""

    def nested(self, make):
        x, pair = make(5, 3), Named(make(5), make(()))
        return Inputs(
            ((x, [pair, "text"]),),
            {"batch": library().BatchEncoding({"ids": make(5, 2)}), "flag": None},
        )

    def test_to_moves_every_tensor_and_keeps_the_containers(self):
        moved = self.nested(torch.zeros).to(torch.device("meta"))
        (x, (pair, text)), batch = moved.args[0], moved.kwargs["batch"]
        assert isinstance(batch, library().BatchEncoding)
        assert isinstance(pair, Named)
        assert (text, moved.kwargs["flag"]) == ("text", None)
        assert {t.device.type for t in (x, *pair, batch["ids"])} == {"meta"}

    def test_what_was_given_is_left_as_it_was(self):
        given = self.nested(torch.zeros)
        given.to(torch.device("meta"))
        assert given.kwargs["batch"]["ids"].device.type == "cpu"

    def test_head_cuts_what_has_the_batch_size(self):
        head = self.nested(torch.zeros).head(2)
        x, (pair, _) = head.args[0]
        shapes = [x.shape, pair.x.shape, pair.y.shape, head.kwargs["batch"]["ids"].shape]
        assert [list(shape) for shape in shapes] == [[2, 3], [2], [], [2, 2]]


class TestRefusals:
    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (None, r"batch 1: labels must be integers .*got NoneType"),
            (["cat", "dog"], r"batch 1: labels must be integers .*got list"),
            ([[0], [1, 2]], r"batch 1: labels must be integers .*got list"),
            (np.array([True, False]), r"batch 1: labels must be integers .*got bool \[2\]"),
            (np.array([0.5, 1.0]), r"batch 1: labels must be integers .*got float64 \[2\]"),
        ],
    )
    def test_labels_that_are_no_class_numbers(self, labels, message):
        with pytest.raises(TypeError, match=message):
            profiled([(images(2, 12), [0, 1]), (images(2, 12), labels)])

    def test_soft_labels_where_class_numbers_are_needed(self):
        model, batches = settled(Mlp(), 12), loader(24, shape=(12,))
        slicing = nss.slice(nss.profile(model, batches))
        with pytest.raises(TypeError, match=r"labels must be integers \[N\] or \[N, T\], got"):
            nss.readapt(model, slicing, [(images(2, 12), torch.rand(2, 4))])
