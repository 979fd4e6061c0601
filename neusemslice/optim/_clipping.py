"""Clipping by the norm of the gradients of tuned rows."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from neusemslice.optim._rows import as_spread, own_share, with_dimension

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass
class TunedGradient:
    """The gradient of a parameter, of which `rows` (of this rank's share) are tuned."""

    parameter: Tensor
    rows: Tensor
    dim: int

    def __post_init__(self) -> None:
        assert self.parameter.grad is not None
        self.grad = with_dimension(own_share(self.parameter.grad))
        # Compact, or of a parameter that is tuned whole.
        self.all = self.grad.shape[self.dim] == self.rows.numel()
        self.tuned = self.grad if self.all else self.grad.index_select(self.dim, self.rows)

    def scale(self, factor: Tensor) -> None:
        self.tuned.mul_(factor.to(self.tuned.device, self.tuned.dtype))
        if not self.all:
            self.grad.index_copy_(self.dim, self.rows, self.tuned)


def total_norm(gradients: Iterable[TunedGradient], norm_type: float) -> Tensor:
    """The norm of all tuned elements together, float32 or float64; the same on all ranks."""
    groups: dict[Hashable, list[Tensor]] = {}
    meshes: dict[Hashable, DTensor | None] = {}
    for gradient in gradients:
        spread = as_spread(gradient.parameter)
        key = (spread.device_mesh, spread.placements) if spread is not None else None
        meshes[key] = spread
        dtype = torch.float64 if gradient.tuned.dtype == torch.float64 else torch.float32
        if gradient.tuned.numel() > 0:
            norm = torch.linalg.vector_norm(gradient.tuned, norm_type, dtype=dtype)
        else:  # of which there is no largest magnitude
            norm = torch.zeros((), dtype=dtype, device=gradient.tuned.device)
        groups.setdefault(key, []).append(norm)
    norms = []
    for place, own in groups.items():
        norm = _norm_of_norms(own, norm_type)
        spread = meshes[place]
        if spread is not None:
            for mesh_dim, placement in enumerate(spread.placements):
                if placement.is_shard():
                    norm = _over_ranks(norm, norm_type, spread.device_mesh.get_group(mesh_dim))
        norms.append(norm)
    return _norm_of_norms(norms, norm_type) if norms else torch.zeros(())


def _norm_of_norms(norms: list[Tensor], norm_type: float) -> Tensor:
    device = norms[0].device
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), norm_type)
    return norm


def _over_ranks(norm: Tensor, norm_type: float, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(norm) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, norm, group=group)
    return _norm_of_norms(parts, norm_type)
