"""Meeting a target: the largest slice that does, and the plan of what it would leave.

All groups grow together (``maintain/budgets.py``) until the next step is too much; then single
groups take steps for what is left of the target, those first that win most by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.maintain.budgets import (
    Ranked,
    by_importance,
    kept_slice,
    of_contribution,
    of_share,
    ranked,
    stepped,
)
from neusemslice.maintain.cost import sliced_cost
from neusemslice.maintain.redundancy import by_redundancy
from neusemslice.slicing import SemanticSlicing, Slice


@dataclass(frozen=True)
class GroupPlan:
    """What becomes of a coupled group.

    Attributes:
        sites: of the group.
        before, after: its neurons.
        losses: float64 ``[before + 1]``, the share of the contribution to the classes, their mean,
            that goes if the group keeps its first ``k`` neurons: its sensitivity.
        parameters, macs: how many fewer there are if this group alone is cut.
        kept_whole: why none of its neurons may be removed; empty where they may.
    """

    sites: tuple[str, ...]
    before: int
    after: int
    losses: Tensor
    parameters: int
    macs: int
    kept_whole: str

    @property
    def lost(self) -> float:
        """Share of the contribution that goes with the removed neurons."""
        return float(self.losses[self.after])


@dataclass(frozen=True)
class Plan:
    """What restructuring would do; nothing is cut.

    Attributes:
        kept: the slice that would stay; give it to ``restructure``, as it is or changed.
        groups: in the order of the graph.
        parameters, macs: before and after.
    """

    kept: Slice
    groups: tuple[GroupPlan, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]


def plan(
    model: nn.Module,
    slicing: SemanticSlicing,
    *,
    calibration: Iterable[Any] | None = None,
    macs: float | None = None,
    params: float | None = None,
    keep: float | None = None,
    round_to: int | None = None,
) -> Plan:
    """What ``restructure`` would keep for a target, group by group, without cutting anything.

    Without a target it is the critical slice.

    Args:
        model: that the slicing was made from; without calibration or a target it is not run, and
            may be on the meta device.
        calibration: what ``restructure`` is to compensate with. None for what it keeps with
            ``compensate=False``: neurons are then ranked by importance alone, as nothing is folded.
            Without a target it makes no difference.
        macs, params, keep, round_to: as for ``restructure``.

    Raises:
        ValueError: as ``restructure``.
    """
    target = checked_target("plan", {"macs": macs, "params": params, "keep": keep}, round_to)
    slicing.critical_slice().check_model(model)
    graph = slicing.profile.graph
    orders = ordered(model, slicing, None if target is None else calibration, "plan")
    if target is None:
        kept = removable(slicing.critical_slice(), "plan")
    else:
        kept = meet(model, slicing, orders, *target, round_to, "plan")
    # Critical neurons need not be the first of their group.
    for i, (group, order) in enumerate(zip(graph.groups, orders, strict=True)):
        stays = kept.mask(group.sites[0])[order]
        orders[i] = torch.cat([order[stays], order[~stays]])
    whole = Slice.whole(graph)
    before, after = sliced_cost(model, graph, whole), sliced_cost(model, graph, kept)
    plans = []
    for entry in ranked(slicing, orders, 1):
        sites = entry.group.sites
        alone = whole.masks() | {name: kept.mask(name) for name in sites}
        cost = sliced_cost(model, graph, Slice(graph, alone))
        plans.append(
            GroupPlan(
                sites,
                entry.neurons,
                int(kept.mask(sites[0]).sum()),
                entry.losses,
                before[0] - cost[0],
                before[1] - cost[1],
                entry.group.kept_whole,
            )
        )
    return Plan(kept, tuple(plans), (before[0], after[0]), (before[1], after[1]))


def checked_target(
    caller: str, targets: Mapping[str, float | None], round_to: int | None
) -> tuple[str, float] | None:
    """The one target that is given, by name; none if there is none.

    Raises:
        ValueError: for several, one outside (0, 1], or ``round_to`` below 1.
    """
    chosen = {name: value for name, value in targets.items() if value is not None}
    if len(chosen) > 1:
        raise ValueError(f"{caller}: give one target, got {sorted(chosen)}")
    for name, value in chosen.items():
        if not 0 < value <= 1:
            raise ValueError(f"{caller}: {name} must lie in (0, 1], got {value}")
    if round_to is not None and round_to < 1:
        raise ValueError(f"{caller}: round_to must be at least 1, got {round_to}")
    return next(iter(chosen.items()), None)


def ordered(
    model: nn.Module, slicing: SemanticSlicing, calibration: Iterable[Any] | None, caller: str
) -> list[Tensor]:
    """Each group's neurons, those to keep first: int64 ``[C]``.

    Args:
        calibration: what the removed ones are folded with, or None if they are not.
        caller: named in errors.

    Raises:
        ValueError: as ``by_redundancy``.
    """
    if calibration is None:
        return by_importance(slicing)
    return by_redundancy(model, slicing, calibration, caller)


def meet(
    model: nn.Module,
    slicing: SemanticSlicing,
    orders: Sequence[Tensor],
    name: str,
    target: float,
    round_to: int | None,
    caller: str,
    latency_left: Callable[[Slice], float] | None = None,
) -> Slice:
    """The largest slice that meets the target and may be cut.

    Args:
        model: that the slicing was made from.
        slicing: says what goes with each neuron.
        orders: of each group's neurons, those to keep first.
        name: of the target: "macs", "params", "latency" or "keep".
        target: in (0, 1], the share to keep at most; of "keep", the share of each group's neurons.
        round_to: each group keeps a multiple of this, or all; with None, of what makes it fast if
            the target is about speed and can be met so.
        caller: named in errors.
        latency_left: measures what a slice would leave of the whole model's latency.

    Raises:
        ValueError: if the target cannot be met.
    """
    rest = functools.partial(_met, model, slicing, name, target, caller, latency_left)
    if round_to is None and name in ("macs", "latency"):
        try:
            return rest(ranked(slicing, orders, None))
        except ValueError:
            return rest(ranked(slicing, orders, 1))
    return rest(ranked(slicing, orders, round_to or 1))


def _met(
    model: nn.Module,
    slicing: SemanticSlicing,
    name: str,
    target: float,
    caller: str,
    latency_left: Callable[[Slice], float] | None,
    groups: list[Ranked],
) -> Slice:
    graph = slicing.profile.graph

    def keeping(numbers: tuple[int, ...]) -> Slice:
        return removable(kept_slice(graph, groups, numbers), caller)

    def at(level: float) -> tuple[int, ...]:
        return of_contribution(groups, level)

    if name == "keep":
        return keeping(of_share(groups, target))

    whole_cost = sliced_cost(model, graph, Slice.whole(graph))

    @functools.cache
    def share_left(numbers: tuple[int, ...]) -> float:
        """What would be left of that which the target is about."""
        kept = keeping(numbers)
        if name == "latency":
            assert latency_left is not None
            return latency_left(kept)
        part = 0 if name == "params" else 1
        return sliced_cost(model, graph, kept)[part] / max(1, whole_cost[part])

    if share_left(at(0.0)) > target:
        raise ValueError(
            f"{caller}: {name}={target} cannot be met; the fewest neurons per group leave "
            f"{share_left(at(0.0)):.3f}"
        )
    low, high = 0.0, 1.0
    if name != "latency" and share_left(at(high)) <= target:
        low = high
    # Counted costs are met more finely than by one neuron of any layer that fits in memory. A
    # measured one is not known better than to a few percent.
    for _ in range(7 if name == "latency" else 24):
        middle = (low + high) / 2
        low, high = (middle, high) if share_left(at(middle)) <= target else (low, middle)
    numbers = at(low)
    if name == "latency":
        return keeping(numbers)
    return keeping(_filled(groups, numbers, lambda more: share_left(more) <= target))


def _filled(
    groups: list[Ranked],
    numbers: tuple[int, ...],
    fits: Callable[[tuple[int, ...]], bool],
) -> tuple[int, ...]:
    """Steps of single groups as long as any fits, those first that win most by one."""
    open_groups = set(range(len(groups)))
    while open_groups:
        more = {i: stepped(numbers[i] + 1, groups[i]) for i in open_groups}
        best = max(
            sorted(open_groups),
            key=lambda i: float(groups[i].losses[numbers[i]] - groups[i].losses[more[i]]),
        )
        candidate = (*numbers[:best], more[best], *numbers[best + 1 :])
        if candidate != numbers and fits(candidate):
            numbers = candidate
        else:
            open_groups.remove(best)  # what is too much now will be too much later
    return numbers


def removable(wanted: Slice, caller: str) -> Slice:
    """The closed slice, with whole groups where nothing may be removed, and no site left empty."""
    masks = wanted.closed().masks()
    for group in wanted.graph.groups:
        for name in group.sites:
            if group.kept_whole:
                masks[name] = torch.ones_like(masks[name])
            elif not masks[name].any():
                raise ValueError(f"{caller}: no neuron of site {name} would be left")
            elif int(masks[name].sum()) < group.least:
                raise ValueError(
                    f"{caller}: site {name} must keep at least {group.least} neurons, as many "
                    f"experts as each token has; {int(masks[name].sum())} would be left"
                )
    return Slice(wanted.graph, masks)
