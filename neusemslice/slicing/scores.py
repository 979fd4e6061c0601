"""Contribution scores: how much each neuron of a site matters to each class.

A score takes a profile and a site's name and gives float64 ``[K, C]``, not negative. With ``a`` the
pooled activation and ``g`` the gradient of the sample's own loss with respect to it:

========  =============================================================================
avg       ``|mean of a|`` over the class's samples
var       variance of ``a`` within the class
taylor    mean of ``|a · g|``: the first-order change of the loss if the neuron were 0
          (Molchanov et al., Importance Estimation for Neural Network Pruning, 2019)
========  =============================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neusemslice.profiling import Profile

Score = Callable[[Profile, str], Tensor]


def avg(profile: Profile, site: str) -> Tensor:
    """``|mean|`` of the activation, ``[K, C]``."""
    mean = profile.activations[site].mean
    assert mean is not None
    return mean.abs()


def var(profile: Profile, site: str) -> Tensor:
    """Variance of the activation within the class, ``[K, C]``."""
    return profile.activations[site].variance()


def taylor(profile: Profile, site: str) -> Tensor:
    """Mean of ``|a · g|``, ``[K, C]``."""
    mean_abs = profile.contributions[site].mean_abs
    assert mean_abs is not None
    return mean_abs.double()


SCORES: dict[str, Score] = {"avg": avg, "var": var, "taylor": taylor}


def shares(scores: Tensor) -> Tensor:
    """Each class's scores as shares of their sum, ``[K, C]``; zeros where the sum is 0."""
    total = scores.sum(1, keepdim=True)
    return torch.where(total > 0, scores / total.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def critical_sets(p: Tensor, threshold: float) -> Tensor:
    """For each class the fewest neurons whose shares add up to ``threshold`` of the whole.

    Args:
        p: shares, float64 ``[K, C]``.
        threshold: θ in (0, 1]; at 1 every neuron with a share is critical.

    Returns:
        bool ``[K, C]``. Among equal shares the lower index comes first. A class whose shares are
        all zero has an empty set.
    """
    ranked, order = p.sort(dim=1, descending=True, stable=True)
    needed = ranked > 0
    if threshold < 1 and p.shape[1]:
        cumulative = ranked.cumsum(1)
        before = torch.cat([cumulative.new_zeros(len(p), 1), cumulative[:, :-1]], 1)
        # A neuron is needed as long as those before it fall short of the threshold; by less than
        # the sum's own rounding is not short.
        rounding = p.shape[1] * torch.finfo(p.dtype).eps
        needed &= before < threshold * cumulative[:, -1:] * (1 - rounding)
    return torch.zeros_like(needed).scatter(1, order, needed)
