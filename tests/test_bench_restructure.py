"""The studies of restructuring and compression run, and peers rank as they say."""

import pytest
import torch
from helpers import quick
from torch import nn

from bench import cifar, mnist

needs_images = pytest.mark.skipif(cifar.missing() is not None, reason=str(cifar.missing()))
needs_digits = pytest.mark.skipif(mnist.missing() is not None, reason=str(mnist.missing()))


@pytest.mark.slow
@needs_images
def test_the_quick_study_of_restructuring():
    found = quick("bench.restructure")
    assert {"plain", "compensated", "above"} <= found["50% removed: ours"].keys()
    assert {"plain"} <= found["50% removed: Taylor"].keys()
    assert {"accuracy", "above", "worst"} <= found["tuned: ours"].keys()
    assert sum(name.startswith("tuned: ") for name in found) == 3
    assert all("faster" in found[name] for name in found if name.startswith("multiply-adds"))


@pytest.mark.slow
@needs_digits
def test_the_quick_study_of_compression():
    found = quick("bench.compression")
    for granularity in ("neurons", "weights"):
        for method in ("lamp", "global"):
            name = f"LeNet-5, MNIST: {granularity}, {method}"
            assert {"rate", "iterations", "accuracy"} <= found[name].keys()
            assert "vs_without" in found[f"{name}, slicing first"]


def test_a_teacher_is_asked_once_for_each_batch():
    compression = pytest.importorskip("bench.compression")
    asked = []
    model = nn.Linear(3, 2)
    model.register_forward_hook(lambda *_: asked.append(1))
    teacher = compression.Remembering(model)
    batches = torch.randn(2, 5, 3)
    expected = [model(x) for x in batches]
    asked.clear()
    for x, answer in (*zip(batches, expected, strict=True), (batches[0].clone(), expected[0])):
        assert torch.equal(teacher(x), answer)
    assert len(asked) == 2


@needs_images
def test_importances_rank_as_their_formulas_do():
    importances = pytest.importorskip("bench.importances")
    model = cifar.trained("resnet20_cifar10_jpeg")
    images = cifar.load("test")[:8]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = model.layer2[1].conv1.weight.detach()
    norm = model.layer2[1].bn1
    expected = {
        "L1, filter": weight.abs().flatten(1).sum(1),
        "L2, filter": weight.square().flatten(1).sum(1),
        "BN scale": norm.weight.detach().abs(),
    }
    for name, scores in expected.items():
        found = importances.ranking(model, name, images)["layer2.1.conv1"]
        assert found == scores.sort(descending=True, stable=True).indices.tolist(), name
    for name in importances.IMPORTANCES:
        for layer, order in importances.ranking(model, name, images).items():
            assert sorted(order) == list(range(model.get_submodule(layer).out_channels)), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
