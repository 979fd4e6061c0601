"""DeepArc's layers: which can be removed, how alike they are, and what is left without them."""

import pytest
import torch
from torch import nn

from bench import cifar
from bench.study import layers, networks
from neusemslice.profiling import LinearCKA


def plain(width=8):
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3),
    )  # fmt: skip


def batches(*shape, count=3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32, *shape, generator=generator), torch.zeros(32)) for _ in range(count)]


def test_layers_that_keep_their_shape_can_be_removed():
    assert layers.units(plain()) == [("2",), ("4",)]
    assert layers.units(networks.vgg11()) == [
        ("11", "12"),
        ("18", "19"),
        ("22", "23"),
        ("25", "26"),
    ]
    blocks = [name for (name,) in layers.units(cifar.ResNet(3))]
    assert blocks == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)
                      if stage == 1 or block]  # fmt: skip


def test_blocks_of_a_transformer_can_be_removed():
    pytest.importorskip("transformers")
    model = networks.vit().eval()
    assert len(layers.units(model)) == 4
    smaller = layers.without(model, [0.0, 0.99, 0.0, 0.99], 0.9)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(x), smaller(x)
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)
    kept = sum(p.numel() for p in smaller.parameters())
    assert kept < sum(p.numel() for p in model.parameters())


def test_likeness_is_the_cka_of_what_a_layer_reads_and_gives():
    model = plain().eval()
    given = batches(6)
    found = layers.likeness(model, given)
    x = torch.cat([x for x, _ in given])
    with torch.no_grad():
        reads, gives = model[:2](x), model[:3](x)
    state = LinearCKA()
    state.update({"reads": reads, "gives": gives})
    assert found[0] == pytest.approx(float(state.compute().values[0, 1]), abs=1e-6)


def test_a_layer_that_repeats_what_it_reads_is_alike_and_can_go():
    model = plain().eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(8))
        model[2].bias.zero_()
    alike = layers.likeness(model, batches(6))
    assert alike[0] == pytest.approx(1.0)
    smaller = layers.without(model, alike, max(0.99, alike[1]))
    x = batches(6)[0][0]
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x))
    assert isinstance(model[2], nn.Linear), "the given model changed"
    assert layers.without(model, alike, 1.0) is None


def test_a_residual_block_goes_whole():
    model = cifar.ResNet(3).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    smaller = layers.without(model, [0.95, *[0.0] * 6], 0.9)
    bypassed = cifar.ResNet(3).eval()
    bypassed.load_state_dict(model.state_dict())
    bypassed.layer1[0].forward = lambda x: x
    with torch.no_grad():
        assert torch.equal(smaller(x), bypassed(x))
