"""Meeting a target: the largest slice that does, and the plan of what it would leave.

All groups grow together (``maintain/budgets.py``) until the next step is too much; then single
groups take steps for what is left of the target, those first that win most by one: of their
contribution, or of what changes the answers for what it costs. A neuron costs less where its
neighbours are fewer, so costs are counted again, once, with what was found first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.maintain.budgets import (
    Ranked,
    by_importance,
    kept_slice,
    of_change,
    of_contribution,
    of_share,
    ranked,
    stepped,
)
from neusemslice.maintain.cost import sliced_cost
from neusemslice.maintain.redundancy import by_redundancy
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

    def rest(step: int | None) -> Slice:
        groups = ranked(slicing, found.orders, step)
        return _met(model, slicing, groups, found.changes, name, target, caller, latency_left)

    if round_to is None and name in ("macs", "latency"):
        try:
            return rest(None)
        except ValueError:
            return rest(1)
    return rest(round_to or 1)


def _met(
    model: nn.Module,
    slicing: SemanticSlicing,
    groups: list[Ranked],
    changes: Sequence[Tensor] | None,
    name: str,
    target: float,
    caller: str,
    latency_left: Callable[[Slice], float] | None,
) -> Slice:
    graph = slicing.profile.graph

    def keeping(numbers: tuple[int, ...]) -> Slice:
        return removable(kept_slice(graph, groups, numbers), caller)

    if name == "keep":
        return keeping(of_share(groups, target))

    part = 0 if name == "params" else 1
    whole_cost = max(1, sliced_cost(model, graph, Slice.whole(graph))[part])

    @functools.cache
    def counted(numbers: tuple[int, ...]) -> float:
        """Share of the whole model's parameters or multiply-adds."""
        return sliced_cost(model, graph, keeping(numbers))[part] / whole_cost

    @functools.cache
    def share_left(numbers: tuple[int, ...]) -> float:
        """What would be left of that which the target is about."""
        if name == "latency":
            assert latency_left is not None
            return latency_left(keeping(numbers))
        return counted(numbers)

    def fits(numbers: tuple[int, ...]) -> bool:
        return share_left(numbers) <= target

    fewest, whole = of_share(groups, 0.0), of_share(groups, 1.0)
    if not fits(fewest):
        raise ValueError(
            f"{caller}: {name}={target} cannot be met; the fewest neurons per group leave "
            f"{share_left(fewest):.3f}"
        )
    if name != "latency" and fits(whole):
        return keeping(whole)
    # Counted costs are met more finely than by one neuron of any layer that fits in memory. A
    # measured one is not known better than to a few percent.
    halvings = 7 if name == "latency" else 24

    if changes is None:
        numbers = _largest(functools.partial(of_contribution, groups), fits, halvings)
        lost = [group.losses for group in groups]
        prices = [1.0] * len(groups)
    else:
        lost = list(changes)
        prices = _prices(groups, whole, counted)
        at = functools.partial(of_change, groups, changes)
        numbers = _largest(functools.partial(at, prices), fits, halvings)
        if name != "latency":
            prices = _prices(groups, numbers, counted)
            numbers = _largest(functools.partial(at, prices), fits, halvings)
    if name == "latency":
        return keeping(numbers)
    numbers = _filled(groups, numbers, lost, prices, fits)
    if changes is not None:
        numbers = _exchanged(groups, numbers, lost, prices, fits)
    return keeping(numbers)


def _largest(
    at: Callable[[float], tuple[int, ...]], fits: Callable[[tuple[int, ...]], bool], halvings: int
) -> tuple[int, ...]:
    """The numbers of neurons at the highest level that fits; those at level 0 do."""
    low, high = 0.0, 1.0
    if fits(at(high)):
        return at(high)
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    return at(low)


def _prices(
    groups: Sequence[Ranked],
    numbers: tuple[int, ...],
    counted: Callable[[tuple[int, ...]], float],
) -> list[float]:
    """What a neuron of each group costs, mean over the half of them that would go next.

    Of a group that can lose none, over as many as would come.
    """
    prices = []
    for i, (group, number) in enumerate(zip(groups, numbers, strict=True)):
        low, high = max(group.group.least, number // 2), number
        if low >= high:
            low, high = number, min(group.neurons, 2 * number)
        if group.group.kept_whole or low == high:
            prices.append(0.0)
            continue
        more, fewer = (counted((*numbers[:i], n, *numbers[i + 1 :])) for n in (high, low))
        prices.append((more - fewer) / (high - low))
    return prices


def _filled(
    groups: list[Ranked],
    numbers: tuple[int, ...],
    lost: Sequence[Tensor],
    prices: Sequence[float],
    fits: Callable[[tuple[int, ...]], bool],
) -> tuple[int, ...]:
    """Steps of single groups as long as any fits, those first that win most by one.

    Args:
        lost: with the groups' first ``k`` neurons; ``[C + 1]``.
        prices: of a neuron of each group.
    """
    open_groups = set(range(len(groups)))
    while open_groups:
        more = {i: stepped(numbers[i] + 1, groups[i]) for i in open_groups}

        def won(i: int, more: dict[int, int] = more, numbers: tuple[int, ...] = numbers) -> float:
            gain = float(lost[i][numbers[i]] - lost[i][more[i]])
            cost = prices[i] * (more[i] - numbers[i])
            return gain / cost if cost > 0 else gain

        best = max(sorted(open_groups), key=won)
        candidate = (*numbers[:best], more[best], *numbers[best + 1 :])
        if candidate != numbers and fits(candidate):
            numbers = candidate
        else:
            open_groups.remove(best)  # what is too much now will be too much later
    return numbers


def _exchanged(
    groups: list[Ranked],
    numbers: tuple[int, ...],
    changes: Sequence[Tensor],
    prices: Sequence[float],
    fits: Callable[[tuple[int, ...]], bool],
) -> tuple[int, ...]:
    """Some steps more of a group for steps of others, while that wins a hundredth.

    One rate for all groups passes over numbers between those that are best at some rate; in small
    groups they are far apart.
    """

    def total(numbers: tuple[int, ...]) -> float:
        return sum(float(c[n]) for c, n in zip(changes, numbers, strict=True))

    going_on = True
    while going_on:
        going_on = False
        for i, group in enumerate(groups):
            for steps in (1, 2, 4, 8):
                more = stepped(numbers[i] + steps * group.step, group)
                candidate: tuple[int, ...] | None = (*numbers[:i], more, *numbers[i + 1 :])
                while candidate is not None and not fits(candidate):
                    candidate = _shed(groups, candidate, changes, prices, but=i)
                if candidate is not None and total(candidate) < 0.99 * total(numbers):
                    numbers = _filled(groups, candidate, changes, prices, fits)
                    going_on = True
    return numbers


def _shed(
    groups: list[Ranked],
    numbers: tuple[int, ...],
    changes: Sequence[Tensor],
    prices: Sequence[float],
    but: int,
) -> tuple[int, ...] | None:
    """A step fewer of the group that changes least for what it costs; none if none can go."""
    best, least = None, math.inf
    for i, (group, number) in enumerate(zip(groups, numbers, strict=True)):
        fewer = (number - 1) // group.step * group.step
        if i == but or group.group.kept_whole or fewer < max(1, group.group.least):
            continue
        saved = prices[i] * (number - fewer)
        worse = float(changes[i][fewer] - changes[i][number])
        if saved > 0 and worse / saved < least:
            best, least = i, worse / saved
            candidate = (*numbers[:i], fewer, *numbers[i + 1 :])
    return None if best is None else candidate


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
