"""Targets: what is known of a model's groups, the slice that meets a target, and the plan of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.maintain.budgets import by_importance, ranked
from neusemslice.maintain.cost import sliced_cost
from neusemslice.maintain.redundancy import by_redundancy
from neusemslice.maintain.search import largest, removable
from neusemslice.maintain.sensitivity import answer_changes
from neusemslice.slicing import SemanticSlicing, Slice


@dataclass(frozen=True)
class GroupPlan:
    """What becomes of a coupled group.

    Attributes:
        sites: of the group.
        before, after: its neurons.
        losses: float64 ``[before + 1]``, the share of the contribution to the classes, their mean,
            that goes if the group keeps its first ``k`` neurons: its sensitivity by the profile.
        changes: float64 ``[before + 1]``, how much the answers change if the group alone keeps its
            first ``k`` neurons and the others are folded into them, relative to how much answers
            vary: its sensitivity as measured. None where it was not.
        parameters, macs: how many fewer there are if this group alone is cut.
        kept_whole: why none of its neurons may be removed; empty where they may.
    """

    sites: tuple[str, ...]
    before: int
    after: int
    losses: Tensor
    changes: Tensor | None
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
            ``compensate=False``: neurons are then ranked by importance alone, as nothing is folded,
            and groups get their budgets by the profile alone. Without a target it makes no
            difference.
        macs, params, keep, round_to: as for ``restructure``.

    Raises:
        ValueError: as ``restructure``.
    """
    target = checked_target("plan", {"macs": macs, "params": params, "keep": keep}, round_to)
    slicing.critical_slice().check_model(model)
    graph = slicing.profile.graph
    if target is None:
        kept = removable(slicing.critical_slice(), "plan")
        found = Sensitivity(by_importance(slicing))
    else:
        found = sensitivity_of(model, slicing, calibration, target[0], "plan")
        kept = meet(model, slicing, found, *target, round_to, "plan")
    # Critical neurons need not be the first of their group.
    orders = []
    for group, order in zip(graph.groups, found.orders, strict=True):
        stays = kept.mask(group.sites[0])[order]
        orders.append(torch.cat([order[stays], order[~stays]]))
    whole = Slice.whole(graph)
    before, after = sliced_cost(model, graph, whole), sliced_cost(model, graph, kept)
    plans = []
    for number, entry in enumerate(ranked(slicing, orders, 1)):
        sites = entry.group.sites
        alone = whole.masks() | {name: kept.mask(name) for name in sites}
        cost = sliced_cost(model, graph, Slice(graph, alone))
        plans.append(
            GroupPlan(
                sites,
                entry.neurons,
                int(kept.mask(sites[0]).sum()),
                entry.losses,
                None if found.changes is None else found.changes[number],
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


@dataclass(frozen=True)
class Sensitivity:
    """What says how many neurons of each group to keep, and which.

    Attributes:
        orders: of each group's neurons, those to keep first; int64 ``[C]``.
        changes: of the answers if a group alone keeps its first ``k``, float64 ``[C + 1]``; None
            if not measured.
    """

    orders: list[Tensor]
    changes: list[Tensor] | None = None


def sensitivity_of(
    model: nn.Module,
    slicing: SemanticSlicing,
    calibration: Iterable[Any] | None,
    target: str,
    caller: str,
) -> Sensitivity:
    """Of a model's groups, measured if there is a calibration and the target leaves a choice.

    Args:
        calibration: what the removed neurons are folded with, or None if they are not.
        target: its name; with "keep" all groups keep the same share of their neurons.
        caller: named in errors.

    Raises:
        ValueError: as ``by_redundancy``.
    """
    orders = ordered(model, slicing, calibration, caller)
    if calibration is None or target == "keep":
        return Sensitivity(orders)
    graph = slicing.profile.graph
    return Sensitivity(orders, answer_changes(model, graph, orders, calibration, caller))


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
    found: Sensitivity,
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
        found: which neurons of each group to keep first, and what goes with the others.
        name: of the target: "macs", "params", "latency" or "keep".
        target: in (0, 1], the share to keep at most; of "keep", the share of each group's neurons.
        round_to: each group keeps a multiple of this, or all; with None, of what makes it fast if
            the target is about speed and can be met so.
        caller: named in errors.
        latency_left: measures what a slice would leave of the whole model's latency.

    Raises:
        ValueError: if the target cannot be met.
    """
    graph = slicing.profile.graph

    def rest(step: int | None) -> Slice:
        groups = ranked(slicing, found.orders, step)
        return largest(model, graph, groups, found.changes, name, target, caller, latency_left)

    if round_to is None and name in ("macs", "latency"):
        try:
            return rest(None)
        except ValueError:
            return rest(1)
    return rest(round_to or 1)
