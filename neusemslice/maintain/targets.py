"""Meeting a target: how many neurons of each coupled group stay."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from neusemslice.graph import Group
from neusemslice.maintain.cost import sliced_cost
from neusemslice.slicing import SemanticSlicing, Slice


def meet(
    model: nn.Module,
    slicing: SemanticSlicing,
    name: str,
    target: float,
    round_to: int,
    latency_left: Callable[[Slice], float],
) -> Slice:
    """The largest slice of equal shares per group that meets the target.

    Args:
        model: that the slicing was made from.
        slicing: ranks each group's neurons, by their greatest share in a class.
        name: of the target: "macs", "params", "latency" or "keep".
        target: in (0, 1], the share to keep at most; of "keep", the share of each group's neurons.
        round_to: each group keeps a multiple of this, or all.
        latency_left: measures what a slice would leave of the whole model's latency.

    Raises:
        ValueError: if the target cannot be met.
    """
    graph = slicing.profile.graph
    ranks = [_ranking(slicing, group) for group in graph.groups]

    def keeping(share: float) -> Slice:
        masks = {}
        for group, rank in zip(graph.groups, ranks, strict=True):
            least = (
                len(rank) if group.kept_whole else max(group.least, math.ceil(share * len(rank)))
            )
            count = -(-least // round_to) * round_to
            mask = torch.zeros(len(rank), dtype=torch.bool)
            mask[rank[:count]] = True
            for site in group.sites:
                # Only a group that is kept whole can have sites of several sizes.
                size = graph.site(site).neurons
                masks[site] = mask if size == len(mask) else torch.ones(size, dtype=torch.bool)
        return Slice(graph, masks)

    if name == "keep":
        return keeping(target)

    @functools.cache
    def share_left(share: float) -> float:
        """What would be left of that which the target is about."""
        kept = keeping(share)
        if name == "latency":
            return latency_left(kept)
        part = 0 if name == "params" else 1
        whole_cost = sliced_cost(model, graph, Slice.whole(graph))[part]
        return sliced_cost(model, graph, kept)[part] / max(1, whole_cost)

    if share_left(0.0) > target:
        raise ValueError(
            f"restructure: {name}={target} cannot be met; the fewest neurons per group leave "
            f"{share_left(0.0):.3f}"
        )
    low, high = 0.0, 1.0
    if name != "latency" and share_left(high) <= target:
        return keeping(high)
    # Counted costs are met more finely than by one neuron of any layer that fits in memory. A
    # measured one is not known better than to a few percent.
    for _ in range(7 if name == "latency" else 24):
        middle = (low + high) / 2
        low, high = (middle, high) if share_left(middle) <= target else (low, middle)
    return keeping(low)


def _ranking(slicing: SemanticSlicing, group: Group) -> Tensor:
    """A group's neurons, most important first; ties by index."""
    scores = [slicing.importance(name) for name in group.sites]
    size = scores[0].shape[0]
    together = torch.stack([s for s in scores if s.shape[0] == size]).amax(0)
    return together.sort(descending=True, stable=True).indices
