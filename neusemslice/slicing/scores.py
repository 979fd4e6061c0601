"""Contribution scores: how much each neuron of a site matters to each class.

A score takes a profile and a site's name and gives float64 ``[K, C]``, not negative. With ``a`` the
pooled activation and ``g`` the gradient of the sample's own loss with respect to it:

========  =============================================================================
avg       ``|mean of a|`` over the class's samples
var       variance of ``a`` within the class
taylor    mean of ``|a · g|``: the first-order change of the loss if the neuron were 0
          (Molchanov et al., Importance Estimation for Neural Network Pruning, 2019)
deeplift  mean of ``|Δa · m|``: what the neuron's difference from its activation on the
          baseline does to the logit of the sample's class (``nss.profiling.deeplift``)
ens       mean of the shares by the metrics that the profile was made for
========  =============================================================================

A function of your own is as good as these. By the share of positions where a neuron is active:

    def firing(profile, site):
        return profile.activations[site].active

    slicing = nss.slice(profile, metric=firing)

Of ``profile.overall()``, in which all classes are one, each score is the class-agnostic one.
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


def deeplift(profile: Profile, site: str) -> Tensor:
    """Mean of ``|DeepLIFT contribution|`` to the class's own logit, ``[K, C]``."""
    mean_abs = profile.lifts[site].mean_abs
    assert mean_abs is not None
    return mean_abs.double()


def ens(profile: Profile, site: str) -> Tensor:
    """Mean of the shares by each of the metrics that the profile was made for, ``[K, C]``."""
    each = [shares(SCORES[metric](profile, site)) for metric in profile.metrics]
    return torch.stack(each).mean(0)


SCORES: dict[str, Score] = {
    "avg": avg,
    "var": var,
    "taylor": taylor,
    "deeplift": deeplift,
    "ens": ens,
}
"""The scores that have a name; "ens" is of every profile, the others of one made for them."""


def score_of(profile: Profile, metric: str | Score) -> Score:
    """The score of that name; a score itself as it is.

    Raises:
        ValueError: for a name that the profile has no score of.
    """
    if not isinstance(metric, str):
        return metric
    if metric not in (*profile.metrics, "ens"):
        raise ValueError(
            f"slice: metric must be one of the profile's {profile.metrics}, 'ens' or a "
            f"function, got {metric!r}"
        )
    return SCORES[metric]


def scored(profile: Profile, score: Score, site: str) -> Tensor:
    """A site's scores on the CPU, checked.

    Raises:
        TypeError, ValueError: naming the score and the site, if it gives something else.
    """
    given = score(profile, site)
    name = getattr(score, "__name__", repr(score))
    shape = (profile.num_classes, profile.graph.site(site).neurons)
    if not isinstance(given, Tensor):
        raise TypeError(
            f"slice: the score {name} must give a tensor {list(shape)} for site {site}, "
            f"got {type(given).__name__}"
        )
    if given.shape != shape:
        raise ValueError(
            f"slice: the score {name} must give {list(shape)} for site {site}, "
            f"got {list(given.shape)}"
        )
    given = given.detach().cpu().double()
    if not bool((given.isfinite() & (given >= 0)).all()):
        raise ValueError(
            f"slice: the score {name} must be finite and not negative, at site {site} it is not"
        )
    return given


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
