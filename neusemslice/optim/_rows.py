"""Tuned rows as users give them, checked; and where they lie in a rank's share of a parameter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

Rows: TypeAlias = Tensor | Sequence[int] | Sequence[bool]
"""Tuned rows: rising indices (int64), or a bool mask over the neuron dimension."""

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def with_dimension(t: Tensor) -> Tensor:
    """A scalar as a vector of one neuron; everything else as it is."""
    return t.view(1) if t.dim() == 0 else t


def checked_group(
    optimizer: str, number: int, params: list[Tensor], rows: object, dims: object
) -> tuple[list[Tensor], list[int]]:
    """Rows and neuron dimensions of the parameters of a group, complete and checked.

    Args:
        optimizer: its name, for messages.
        number: the group's.
        params: its parameters.
        rows: None, or a list with an entry for each parameter.
        dims: likewise.

    Raises:
        TypeError: for a parameter or rows of a wrong dtype.
        ValueError: naming the parameter, if something does not fit it.
    """
    for index, parameter in enumerate(params):
        where = f"{optimizer}: parameter {index} of group {number}"
        if parameter.dtype not in _DTYPES:
            raise TypeError(
                f"{where} must be float64, float32, float16 or bfloat16, got {parameter.dtype}"
            )
        if any(parameter is other for other in params[:index]):
            raise ValueError(f"{where} is in the group twice")
        _check_placements(where, parameter)
    for name, listed in (("rows", rows), ("neuron_dims", dims)):
        if listed is None:
            continue
        if not isinstance(listed, (list, tuple)) or len(listed) != len(params):
            got = len(listed) if isinstance(listed, (list, tuple)) else type(listed).__name__
            raise ValueError(
                f"{optimizer}: {name} of group {number} must be a list of {len(params)} "
                f"entries, one for each parameter, got {got}"
            )
    all_rows, all_dims = [], []
    for index, parameter in enumerate(params):
        where = f"{optimizer}: parameter {index} of group {number}"
        dim = _checked_dim(where, parameter, dims[index] if isinstance(dims, (list, tuple)) else 0)
        all_dims.append(dim)
        if isinstance(rows, (list, tuple)):
            all_rows.append(checked_rows(where, parameter, rows[index], dim))
        else:
            all_rows.append(every_row(parameter, dim))
    return all_rows, all_dims


def every_row(parameter: Tensor, dim: int) -> Tensor:
    shape = parameter.shape or (1,)
    return torch.arange(shape[dim], device=parameter.device)


def _checked_dim(where: str, parameter: Tensor, dim: object) -> int:
    dimensions = max(parameter.dim(), 1)
    if not isinstance(dim, int) or not -dimensions <= dim < dimensions:
        raise ValueError(
            f"{where}: its neuron dimension must name one of the dimensions "
            f"of {list(parameter.shape)}, got {dim!r}"
        )
    return dim % dimensions


def checked_rows(where: str, parameter: Tensor, rows: Rows, dim: int) -> Tensor:
    """Rows as int64 indices of their own, on the parameter's device. Errors: `checked_group`."""
    where = f"{where}: its rows"
    size = (parameter.shape or (1,))[dim]
    try:
        given = torch.as_tensor(rows)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} must be indices or a mask of {size} neurons: {error}") from error
    if given.numel() == 0 and not isinstance(rows, Tensor):
        given = given.long()  # an empty list has no dtype
    if given.dtype not in (torch.int64, torch.bool):
        raise TypeError(f"{where} must be int64 or bool, got {given.dtype}")
    if given.dtype == torch.bool:
        if given.shape != (size,):
            raise ValueError(
                f"{where} must be a mask of {size} neurons, got bool {list(given.shape)}"
            )
        return given.nonzero().flatten().to(parameter.device)
    if given.dim() != 1:
        raise ValueError(f"{where} must be int64 [R], got int64 {list(given.shape)}")
    if outside := given[(given < 0) | (given >= size)].tolist():
        raise ValueError(f"{where} must lie in [0, {size}), got {outside[0]}")
    if bool((given[1:] <= given[:-1]).any()):
        raise ValueError(f"{where} must rise without repeats, got {_shortened(given)}")
    return given.detach().clone().to(parameter.device)


def _shortened(rows: Tensor) -> str:
    listed = rows[:8].tolist()
    return str(listed) if rows.numel() <= 8 else f"{str(listed)[:-1]}, …]"


# Parameters that are spread over ranks (FSDP2). Update and state are those of a rank's own share.


def spread_type() -> type[DTensor] | None:
    """The type of spread tensors; None where none can exist, as its module was never imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module.DTensor if module is not None else None


def as_spread(t: Tensor) -> DTensor | None:
    """The tensor, if it is spread over ranks."""
    kind = spread_type()
    return t if kind is not None and isinstance(t, kind) else None


def placements(t: Tensor) -> tuple[Placement, ...] | None:
    """How the tensor is spread over ranks; None if it is not."""
    spread = as_spread(t)
    return None if spread is None else tuple(spread.placements)


def own_share(t: Tensor) -> Tensor:
    """The elements that this rank holds: not a copy."""
    spread = as_spread(t)
    return t if spread is None else spread.to_local()


def own_rows(parameter: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Which rows of this rank's share the given rows of the whole parameter are."""
    spread = as_spread(parameter)
    if spread is None:
        return rows
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        spread.shape, spread.device_mesh, spread.placements
    )
    begin, end = offset[dim], offset[dim] + shape[dim]
    return rows[(rows >= begin) & (rows < end)] - begin


def spread_like(share: Tensor, parameter: Tensor) -> Tensor:
    """Shares of all ranks as one tensor that is spread as the parameter is."""
    spread = as_spread(parameter)
    if spread is None:
        return share
    return type(spread).from_local(
        share,
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=spread.shape,
        stride=spread.stride(),
    )


def _check_placements(where: str, parameter: Tensor) -> None:
    spread = as_spread(parameter)
    if spread is None:
        return
    from torch.distributed.tensor import Replicate, Shard

    if any(type(placement) not in (Replicate, Shard) for placement in spread.placements):
        raise ValueError(
            f"{where} must be sharded along a dimension or replicated, got {spread.placements}"
        )
