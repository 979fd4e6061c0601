"""Meeting a target: the largest slice that does.

All groups grow together (``maintain/budgets.py``) until the next step is too much; then single
groups take steps for what is left of the target, those first that win most by one: of their
contribution, or of what changes the answers for what it costs. A neuron costs less where its
neighbours are fewer, so costs are counted again, once, with what was found first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from neusemslice.graph import Graph
from neusemslice.maintain.budgets import (
    Ranked,
    kept_slice,
    of_change,
    of_contribution,
    of_share,
    stepped,
)
from neusemslice.maintain.cost import sliced_cost
from neusemslice.slicing import Slice


def largest(
    model: nn.Module,
    graph: Graph,
    groups: Sequence[Ranked],
    changes: Sequence[Tensor] | None,
    name: str,
    target: float,
    caller: str,
    latency_left: Callable[[Slice], float] | None = None,
) -> Slice:
    """The largest slice that meets a target and may be cut.

    Args:
        model: that the graph is of.
        groups: all of the graph's.
        changes: of the answers if a group alone keeps its first ``k`` neurons, float64 ``[C + 1]``;
            None if not measured.
        name, target, caller, latency_left: as for ``meet`` in ``maintain/targets.py``.

    Raises:
        ValueError: if the target cannot be met.
    """

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

    lost: Sequence[Tensor]
    prices: list[float] | None
    if changes is None:
        numbers = _highest(functools.partial(of_contribution, groups), fits, halvings)
        lost, prices = [group.losses for group in groups], None
    else:
        lost = changes
        prices = _prices(groups, whole, counted)
        at = functools.partial(of_change, groups, changes)
        numbers = _highest(functools.partial(at, prices), fits, halvings)
        if name != "latency":
            prices = _prices(groups, numbers, counted)
            numbers = _highest(functools.partial(at, prices), fits, halvings)
    if name == "latency":
        return keeping(numbers)
    numbers = _filled(groups, numbers, lost, prices, fits)
    if prices is not None:
        numbers = _exchanged(groups, numbers, lost, prices, fits)
    return keeping(numbers)


def _highest(
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
    groups: Sequence[Ranked],
    numbers: tuple[int, ...],
    lost: Sequence[Tensor],
    prices: Sequence[float] | None,
    fits: Callable[[tuple[int, ...]], bool],
) -> tuple[int, ...]:
    """Steps of single groups as long as any fits, those first that win most by one.

    Args:
        lost: with the groups' first ``k`` neurons; ``[C + 1]``.
        prices: of a neuron of each group, by which wins count; None if all steps cost alike.
    """
    open_groups = set(range(len(groups)))
    while open_groups:
        more = {i: stepped(numbers[i] + 1, groups[i]) for i in open_groups}

        def won(i: int, more: dict[int, int] = more, numbers: tuple[int, ...] = numbers) -> float:
            gain = float(lost[i][numbers[i]] - lost[i][more[i]])
            if prices is None or gain == 0:
                return gain
            cost = prices[i] * (more[i] - numbers[i])
            return gain / cost if cost > 0 else math.inf

        best = max(sorted(open_groups), key=won)
        candidate = (*numbers[:best], more[best], *numbers[best + 1 :])
        if candidate != numbers and fits(candidate):
            numbers = candidate
        else:
            open_groups.remove(best)  # what is too much now will be too much later
    return numbers


def _exchanged(
    groups: Sequence[Ranked],
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
    groups: Sequence[Ranked],
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
