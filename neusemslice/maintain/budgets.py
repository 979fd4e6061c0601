"""Budgets: how many neurons each coupled group keeps, and what goes with the others.

A group's neurons are ranked by their greatest share in the contribution to any one class, or by how
much of it the others cannot make up for (``maintain/redundancy.py``). What a group loses with all
but its first ``k`` is the share of the contribution, mean over the classes that were seen, that the
others have: its sensitivity, which the profile alone tells of any ranking. To meet a target by the
profile alone all groups keep the same share of their contribution, so that none is hurt more than
others: redundant layers give up more neurons than those in which each one counts.

Where the change of the answers is measured (``maintain/sensitivity.py``), its sum over the groups
is made as small as the target allows: each group keeps the number of neurons with the least

    change + rate · price · neurons,

a neuron's price being its share of the cost that the target is about, and the rate the same for
all (Lagrange's condition; Everett 1963, Operations Research 11).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neusemslice.graph import Graph, Group
from neusemslice.slicing import SemanticSlicing, Slice

LANES = 8
"""Floats that vector units take at once; at least two of these fill any."""

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Ranked:
    """A coupled group's neurons, those to keep first.

    Attributes:
        group: see ``Graph.groups``.
        order: int64 ``[C]``.
        losses: float64 ``[C + 1]``, the share of the contribution that goes if the first ``k``
            stay; the greatest of the group's sites.
        step: the group keeps a multiple of this, or all.
    """

    group: Group
    order: Tensor
    losses: Tensor
    step: int

    @property
    def neurons(self) -> int:
        return len(self.order)


def ranked(
    slicing: SemanticSlicing, orders: Sequence[Tensor], round_to: int | None
) -> list[Ranked]:
    """Every group of the slicing's model, in the order of its graph.

    Args:
        orders: of each group's neurons, those to keep first; int64 ``[C]``.
        round_to: the groups' step; with None the one that ``fast_step`` says.
    """
    graph = slicing.profile.graph
    return [
        _ranked(slicing, group, order, fast_step(graph, group) if round_to is None else round_to)
        for group, order in zip(graph.groups, orders, strict=True)
    ]


def by_importance(slicing: SemanticSlicing) -> list[Tensor]:
    """Each group's neurons, the most important first, ties by index: int64 ``[C]``."""
    return [
        importance_of(slicing, group).sort(descending=True, stable=True).indices
        for group in slicing.profile.graph.groups
    ]


def importance_of(slicing: SemanticSlicing, group: Group) -> Tensor:
    """The greatest share of a group's neurons in the contribution to any class, float64 ``[C]``."""
    return torch.stack([slicing.importance(name) for name in _alike(slicing, group)]).amax(0)


def _alike(slicing: SemanticSlicing, group: Group) -> list[str]:
    """Sites of the first one's size: only a group that is kept whole can have others."""
    graph = slicing.profile.graph
    size = graph.site(group.sites[0]).neurons
    return [name for name in group.sites if graph.site(name).neurons == size]


def fast_step(graph: Graph, group: Group) -> int:
    """Of how many neurons a group must keep a multiple to be fast.

    Layers whose widths are multiples of ``LANES`` are; below twice that a step would be too coarse,
    a head's features fill lanes by themselves, and an expert's layers keep their widths.
    """
    site = graph.site(group.sites[0])
    in_layer = any(layer.name == site.producers[0] for layer in graph.layers)
    if site.neurons < 2 * LANES or not in_layer:
        return 1
    return LANES // math.gcd(LANES, *(span.repeat for span in site.rows))


def _ranked(slicing: SemanticSlicing, group: Group, order: Tensor, step: int) -> Ranked:
    losses = []
    for name in _alike(slicing, group):
        p = slicing.shares[name][:, order]
        seen = p[p.sum(1) > 0]
        kept = torch.cat([seen.new_zeros(len(seen), 1), seen.cumsum(1)], 1)
        gone = seen.sum(1, keepdim=True) - kept
        losses.append(gone.clamp_min(0).mean(0) if len(seen) else p.new_zeros(len(order) + 1))
    return Ranked(group, order, torch.stack(losses).amax(0), step)


def of_share(groups: Sequence[Ranked], share: float) -> tuple[int, ...]:
    """How many neurons each group keeps if each keeps this share of them, or its fewest."""
    return _rounded(groups, [math.ceil(share * group.neurons) for group in groups])


def of_contribution(groups: Sequence[Ranked], level: float) -> tuple[int, ...]:
    """The fewest neurons of each group that keep this share of its contribution."""
    # What is short by no more than the sum's own rounding is not short.
    short = [group.losses > 1 - level + group.neurons * _EPS for group in groups]
    return _rounded(groups, [int(group.sum()) for group in short])


def of_change(
    groups: Sequence[Ranked], changes: Sequence[Tensor], prices: Sequence[float], level: float
) -> tuple[int, ...]:
    """How many neurons each group keeps where answers change least for what the neurons cost.

    Args:
        changes: of the answers with the groups' first ``k`` neurons; float64 ``[C + 1]``.
        prices: of a neuron of each group.
        level: in [0, 1]; at 0 the groups keep their fewest neurons, at 1 no neuron goes that
            changes anything. A group never keeps fewer at a higher level.
    """
    fewest = of_share(groups, 0.0)
    if level == 0:
        return fewest
    rate = (1 - level) / level
    numbers = []
    for group, least, change, price in zip(groups, fewest, changes, prices, strict=True):
        counts = sorted({*range(least, group.neurons, group.step), group.neurons})
        total = change[counts] + rate * price * torch.tensor(counts, dtype=torch.float64)
        numbers.append(counts[int(total.argmin())])
    return tuple(numbers)


def _rounded(groups: Sequence[Ranked], numbers: Sequence[int]) -> tuple[int, ...]:
    """Multiples of the groups' steps, or all; all where a group is kept whole."""
    return tuple(
        group.neurons if group.group.kept_whole else stepped(max(group.group.least, number), group)
        for group, number in zip(groups, numbers, strict=True)
    )


def stepped(count: int, group: Ranked) -> int:
    """The next multiple that a group can keep."""
    return min(group.neurons, -(-count // group.step) * group.step)


def kept_slice(graph: Graph, groups: Sequence[Ranked], numbers: Sequence[int]) -> Slice:
    """The slice in which each group keeps so many neurons."""
    masks = Slice.whole(graph).masks()
    for group, number in zip(groups, numbers, strict=True):
        if not group.group.kept_whole:
            mask = torch.zeros(group.neurons, dtype=torch.bool)
            mask[group.order[:number]] = True
            masks.update(dict.fromkeys(group.group.sites, mask))
    return Slice(graph, masks)
