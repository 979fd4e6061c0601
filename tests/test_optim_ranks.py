"""Two ranks with sharded parameters take the steps of one process."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from neusemslice.optim import MaskedAdamW, MaskedSGD

OPTIMIZERS = {
    "sgd": (MaskedSGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (MaskedAdamW, {"lr": 0.01, "weight_decay": 0.05, "amsgrad": True}),
}
STEPS = 12


def model():
    torch.manual_seed(3)
    # Neither 7 nor 5 nor 1 neurons can be shared out evenly.
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def groups(network):
    """Rows of outputs, of inputs, of vectors; a parameter that is tuned whole."""
    first, second, last = network[0], network[2], network[4]
    return [
        {
            "params": [first.weight, first.bias, second.weight],
            "rows": [[0, 3, 4, 6], [0, 3, 4, 6], [0, 3, 4, 6]],
            "neuron_dims": [0, 0, 1],
        },
        {"params": [second.bias, last.weight], "rows": [[4], [0]], "neuron_dims": [0, 0]},
        {"params": [last.bias], "lr": 0.02},
    ]


def batches():
    torch.manual_seed(4)
    return [(torch.randn(8, 6), torch.randn(8, 1)) for _ in range(STEPS)]


def train(network, optimizer, share=slice(None), first=0, last=STEPS):
    weight = optimizer.param_groups[0]["params"][0]
    norms = []
    for step, (x, y) in list(enumerate(batches()))[first:last]:
        optimizer.zero_grad()
        F.mse_loss(network(x[share]), y[share]).backward()
        norms.append(optimizer.clip_grad_norm_(0.5))
        optimizer.step()
        if step == STEPS // 2:
            optimizer.set_rows(weight, [1, 3, 5, 6])
    return norms


def whole(network):
    return {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for name, p in network.named_parameters()
    }


def elements(optimizer):
    """Of the state, but for the rows' numbers of steps: rows can have a share on each rank."""
    return sum(
        state.numel()
        for states in optimizer.state.values()
        for name, state in states.items()
        if name != "step"
    )


def _sharded(rank, world, name):
    kind, options = OPTIMIZERS[name]
    plain = model()
    origin = copy.deepcopy(plain.state_dict())
    optimizer = kind(groups(plain), **options)
    expected = train(plain, optimizer)
    sharded = model()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer)
    fully_shard(sharded)
    other = kind(groups(sharded), **options)
    share = slice(rank, None, world)
    norms = train(sharded, other, share, last=8)
    # Saved and loaded, rank by rank.
    saved = copy.deepcopy(other.state_dict())
    again = kind(groups(sharded), **options)
    again.load_state_dict(saved)
    norms += train(sharded, again, share, first=8)
    torch.testing.assert_close(torch.stack(norms), torch.stack(expected), rtol=1e-5, atol=1e-6)
    for key, tensor in whole(sharded).items():
        torch.testing.assert_close(tensor, plain.state_dict()[key], rtol=1e-5, atol=1e-6)
    frozen = whole(sharded)["0.weight"][[2]]
    assert torch.equal(frozen, origin["0.weight"][[2]])
    held = torch.tensor(elements(again))
    torch.distributed.all_reduce(held)
    assert held.item() == elements(optimizer)
    if name == "adamw" and rank == 0:
        with pytest.raises(ValueError, match="its rows must have had the same number of updates"):
            again.to_torch()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_sharded_parameters_equal_whole_ones(name, tmp_path):
    on_ranks(2, _sharded, tmp_path, name)


def _converted(rank, world):
    sharded = fully_shard(model())
    dense = torch.optim.AdamW(sharded.parameters(), lr=0.01)
    x, y = batches()[0]
    F.mse_loss(sharded(x), y).backward()
    dense.step()
    weight = sharded[0].weight
    masked = MaskedAdamW.from_torch(dense, {weight: [0, 6]})
    back = masked.to_torch()
    found, wanted = (o.state[weight]["exp_avg"].full_tensor() for o in (back, dense))
    assert torch.equal(found[[0, 6]], wanted[[0, 6]])
    assert (found[1:6] == 0).all()
    assert torch.equal(
        back.state[sharded[2].weight]["exp_avg"].full_tensor(),
        dense.state[sharded[2].weight]["exp_avg"].full_tensor(),
    )


def test_sharded_state_is_converted(tmp_path):
    on_ranks(2, _converted, tmp_path)


def _wrapped(rank, world):
    kind, options = OPTIMIZERS["adamw"]
    plain, inner = model(), model()
    train(plain, kind(groups(plain), **options))
    wrapped = DistributedDataParallel(inner)
    train(wrapped, kind(groups(inner), **options), slice(rank, None, world))
    for a, b in zip(inner.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_data_parallel_ranks_equal_one_process(tmp_path):
    on_ranks(2, _wrapped, tmp_path)
