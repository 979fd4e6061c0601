"""Rows that are trained as leaves, on two ranks: they equal one process."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import Residual, images, settled
from ranks import on_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from neusemslice.optim import MaskedAdamW, row_gradients

X = images(12, 1, 8, 8)
Y = torch.arange(12) % 4


def network():
    torch.manual_seed(0)
    return settled(Residual(), 1, 8, 8)


def groups(model):
    """Every other row of what the inner layers have, from the second one on."""
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("stem")]
    rows = [torch.arange(1, len(p), 2) for _, p in named]
    return [{"params": [p for _, p in named], "rows": rows, "lr": 0.01}]


def train(model, optimizer, share=slice(None)):
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(X[share]), Y[share]).backward()
        optimizer.step()


def expected():
    model = network()
    with row_gradients(model, groups(model)) as tuned:
        train(model, MaskedAdamW(tuned.groups()))
    return model.state_dict()


def _wrapped(rank, world):
    model, wanted = network(), expected()
    with row_gradients(model, groups(model)) as tuned:
        train(DistributedDataParallel(model), MaskedAdamW(tuned.groups()), slice(rank, None, world))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="give the model in it, and wrap that inside the block"):
        row_gradients(DistributedDataParallel(model), groups(model)).__enter__()


def test_data_parallel_ranks_equal_one_process(tmp_path):
    on_ranks(2, _wrapped, tmp_path)


def _sharded(rank, world):
    model, wanted = network(), expected()
    origin = copy.deepcopy(model.state_dict())
    for layer in (model.conv1, model.inner):
        fully_shard(layer)
    fully_shard(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with row_gradients(model, groups(model)) as tuned:
        assert all(member.leaf is member.parameter for member in tuned.tuned)
        assert not model.stem.weight.requires_grad
        train(model, MaskedAdamW(tuned.groups()), slice(rank, None, world))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    for name, p in model.named_parameters():
        whole = p.full_tensor()
        torch.testing.assert_close(whole, wanted[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(whole[::2], origin[name][::2])


def test_sharded_ranks_equal_one_process(tmp_path):
    on_ranks(2, _sharded, tmp_path)
