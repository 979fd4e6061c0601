"""Models whose parameters are spread over ranks (FSDP2, tensor parallelism).

Each forward pass of such a model is a collective operation: every rank must run as many of them as
the others, in the same order. What is traced must therefore be the same on every rank.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from neusemslice.graph.model import Inputs


def reshard(model: nn.Module) -> None:
    """Puts the sharded parameters back into the model.

    After a forward pass a module may hold whole parameters, which are other objects than those
    that its user and optimizer know: a flag that is set on them would come and go with them.
    """
    for module in model.modules():
        if is_sharded(module):
            cast("FSDPModule", module).reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # cannot be without having been imported
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def same_inputs(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs of the first of the ranks that share the model; on the CPU if there are others."""
    box = [inputs]
    for group in _groups(model):
        box = [box[0].to(torch.device("cpu"))]
        dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


def smallest(model: nn.Module, number: int) -> int:
    """The smallest of the numbers that the ranks that share the model have."""
    for group in _groups(model):
        numbers: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(numbers, number, group=group)
        number = min(numbers)
    return number


def _groups(model: nn.Module) -> list[dist.ProcessGroup]:
    """One per dimension of the mesh of ranks; none if the model is whole."""
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None:
        reshard(model)
        for parameter in model.parameters():
            if isinstance(parameter, tensors.DTensor):
                return list(parameter.device_mesh.get_all_groups())
    return []
