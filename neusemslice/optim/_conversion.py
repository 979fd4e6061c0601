"""State of torch's own optimizers, which is dense, from and to state of tuned rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neusemslice.optim._rows import own_rows, own_share, spread_like, with_dimension


def options_of(kind: type, group: dict[str, Any]) -> dict[str, Any]:
    """What a class of optimizers takes of a group's options, and what schedulers keep there."""
    taken = {*inspect.signature(kind).parameters, "initial_lr"} - {"params"}
    return {name: value for name, value in group.items() if name in taken}


def compact_state(
    dense: dict[str, Any], names: Sequence[str], parameter: Tensor, rows: Tensor, dim: int
) -> dict[str, Tensor]:
    """The rows' part of a parameter's dense state; empty where torch has taken no step yet."""
    own = own_rows(parameter, rows, dim)
    state: dict[str, Tensor] = {}
    for name in names:
        if dense.get(name) is None:
            return {}
        whole = with_dimension(own_share(dense[name]))
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        state[name] = whole.index_select(dim, own).to(wide).contiguous()
    if state:
        # SGD does not count: its momentum is there or not.
        steps = float(dense.get("step", 1))
        state["step"] = torch.full((own.numel(),), steps, device=parameter.device)
    return state


def dense_state(
    where: str,
    state: dict[str, Tensor],
    names: Sequence[str],
    parameter: Tensor,
    rows: Tensor,
    dim: int,
) -> dict[str, Tensor]:
    """A parameter's dense state, 0 in the rows that are not tuned; empty before a first step.

    Raises:
        ValueError: if the rows have had different numbers of updates.
    """
    if not state or not names or state["step"].numel() == 0:
        return {}
    low, high = (int(count) for count in state["step"].aminmax())
    if low != high:
        raise ValueError(
            f"{where}: its rows must have had the same number of updates to become one state of "
            f"torch, got from {low} to {high}"
        )
    if low == 0:
        return {}
    own = own_rows(parameter, rows, dim)
    share = own_share(parameter)
    dense: dict[str, Tensor] = {"step": torch.tensor(float(low))}
    for name in names:
        whole = torch.zeros_like(share, memory_format=torch.preserve_format)
        with_dimension(whole).index_copy_(dim, own, state[name].to(whole.dtype))
        dense[name] = spread_like(whole, parameter)
    return dense
