"""Choosing neurons within budgets.

What a budget cannot hold is left out as a lower θ would leave it out: a neuron's rank is the share
of the contribution that heavier neurons of its site have together. It is comparable between sites
of any width, which shares themselves are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def ranks(p: Tensor) -> Tensor:
    """The threshold above which each neuron enters a critical set, float64 ``[C]``.

    Args:
        p: shares, float64 ``[K, C]``, of the classes that count; the class that wants a neuron
            first decides. A neuron without a share has 1.
    """
    ranked, order = p.sort(dim=1, descending=True, stable=True)
    before = torch.where(ranked > 0, ranked.cumsum(1) - ranked, 1.0).clamp(0, 1)
    entry = torch.zeros_like(before).scatter(1, order, before)
    return entry.amin(0) if len(entry) else entry.new_ones(p.shape[1])


def within(
    wanted: Mapping[str, Tensor],
    p: Mapping[str, Tensor],
    per_site: float | None = None,
    whole: float | None = None,
    floor: int = 0,
) -> dict[str, Tensor]:
    """The first neurons of a set, by rank, that budgets hold.

    Args:
        wanted: per site bool ``[C]``.
        p: per site the shares, float64 ``[K, C]``, that rank its neurons.
        per_site: at most this share of each site's neurons, rounded up.
        whole: at most this share of all sites' neurons, rounded down.
        floor: at least so many neurons of each site, or all that it has, also if they are not
            wanted; the budgets hold these as well.

    Raises:
        ValueError: for a share outside (0, 1], a negative floor, or a floor above a budget.
    """
    for name, share in (("per_site", per_site), ("whole", whole)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"slice: {name} must lie in (0, 1], got {share}")
    if floor < 0:
        raise ValueError(f"slice: floor must not be negative, got {floor}")
    chosen, spare, keys = {}, {}, []
    for name, mask in wanted.items():
        neurons = len(mask)
        limit = neurons if per_site is None else math.ceil(per_site * neurons)
        least = min(floor, neurons)
        if least > limit:
            raise ValueError(
                f"slice: floor={floor} is above the budget of site {name}, which is {limit} of "
                f"{neurons} neurons"
            )
        rank = ranks(p[name])
        # Wanted neurons first, whatever their rank; heavier ones first where ranks are equal.
        order = _order(rank + 2.0 * ~mask, p[name])
        chosen[name] = torch.zeros(neurons, dtype=torch.bool)
        chosen[name][order[:least]] = True
        rest = order[least:limit]
        spare[name] = rest[mask[rest]]
        keys.append(rank[spare[name]])
    total = sum(len(mask) for mask in wanted.values())
    used = sum(int(mask.sum()) for mask in chosen.values())
    left = (total if whole is None else math.floor(whole * total)) - used
    if left < 0:
        raise ValueError(
            f"slice: floor={floor} takes {used} neurons, whole={whole} allows {left + used}"
        )
    every = torch.cat(keys) if keys else torch.zeros(0)
    taken = torch.zeros(len(every), dtype=torch.bool)
    taken[every.sort(stable=True).indices[:left]] = True
    parts = taken.split([len(key) for key in keys])
    for name, part in zip(spare, parts, strict=True):
        chosen[name][spare[name][part]] = True
    return chosen


def heaviest(p: Tensor, share: float) -> Tensor:
    """Each class's heaviest neurons, a share of them rounded up: bool ``[K, C]``.

    Neurons without a share are left out; of equal ones the lower index comes first.
    """
    count = math.ceil(share * p.shape[1])
    order = p.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(p, dtype=torch.bool).scatter(1, order, True) & (p > 0)


def _order(rank: Tensor, p: Tensor) -> Tensor:
    """Indices by rank, then by the largest share, then by index."""
    weight = p.amax(0) if len(p) else rank.new_zeros(len(rank))
    by_weight = weight.sort(descending=True, stable=True).indices
    return by_weight[rank[by_weight].sort(stable=True).indices]
