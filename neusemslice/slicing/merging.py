"""Merging critical sets over similar classes and over layers, by the parameters that they cost.

A union of critical sets is the same however classes are grouped, and each site's θ is reached on
its own, whatever its neurons cost. Merged, similar classes share one set, in which a neuron counts
with the largest share that it has in any of them; and one set goes over all layers: the neurons of
greatest share for their parameters, until θ of the group's shares over all sites is kept. So layers
whose neurons are many, large and alike give up theirs before those that every class goes through.

What led here, of one profile and 1,000 images: accuracy without training of ResNet-20 on CIFAR-10
(whole 88.9 %), by Taylor, where so many of the parameters are masked; the top of each layer for all
classes together, and the union of each class's top, are the baselines. ``bench.slicing`` compares
what came of it with them, on other images.

==================================================  =====  =====  =====
set                                                 15 %   25 %   35 %
==================================================  =====  =====  =====
top of each layer, all classes together             0.711  0.488  0.342
top of each layer, of any class                     0.572  0.299  0.196
union of critical sets, at a lower θ                0.534  0.226
mean share over classes, for its parameters         0.810  0.734  0.491
largest share over classes, whatever it costs       0.799  0.692
largest share over classes, for its parameters      0.846  0.781  0.624
the same in two groups of similar classes           0.852  0.800  0.624
one set of each class                               0.837  0.766  0.685
==================================================  =====  =====  =====
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def merged_sets(
    p: Mapping[str, Tensor], groups: Tensor, sizes: Mapping[str, int], threshold: float
) -> dict[str, Tensor]:
    """Neurons of the merged critical sets, bool ``[C]`` per site.

    Neurons that are equal in share and size come in the order of sites and indices.

    Args:
        p: per site the shares, float64 ``[K, C]``.
        groups: int64 ``[K]``, the group of each class.
        sizes: per site the parameters of one of its neurons.
        threshold: θ in (0, 1]; at 1 every neuron with a share is in.
    """
    each = torch.cat([torch.full((s.shape[1],), max(1, sizes[name])) for name, s in p.items()])
    every = torch.cat(list(p.values()), 1)
    chosen = torch.zeros(every.shape[1], dtype=torch.bool)
    for group in groups.unique():
        share = every[groups == group].amax(0)
        order = (share / each).sort(descending=True, stable=True).indices
        ranked = share[order]
        needed = ranked > 0
        if threshold < 1 and len(ranked):
            total = ranked.cumsum(0)
            # As in critical_sets: short by less than the sum's own rounding is not short.
            rounding = len(ranked) * torch.finfo(ranked.dtype).eps
            needed &= total - ranked < threshold * total[-1] * (1 - rounding)
        chosen[order[needed]] = True
    return dict(zip(p, chosen.split([s.shape[1] for s in p.values()]), strict=True))
