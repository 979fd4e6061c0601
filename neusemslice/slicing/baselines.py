"""The two simpler ways of slicing: by a share of each layer, whoever needs its neurons."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from neusemslice.profiling import Profile
from neusemslice.slicing.budgets import heaviest
from neusemslice.slicing.scores import Score
from neusemslice.slicing.semantic import checked_classes, shares_of
from neusemslice.slicing.slice import Slice


def global_slice(profile: Profile, metric: str | Score = "taylor", *, top: float) -> Slice:
    """Of each site the neurons that contribute most to all samples together.

    Args:
        profile: what ``neusemslice.profile`` gave.
        metric: as for ``slice``; of the profile in which all classes are one.
        top: in (0, 1], the share of each site's neurons, rounded up. Neurons without any
            contribution are left out, and of equal ones the lower index comes first.

    Raises:
        ValueError, TypeError: as ``slice``, and for ``top`` outside (0, 1].
    """
    _check_top("global_slice", top)
    return _union(profile, shares_of(profile.overall(), metric), top)


def category_slice(
    profile: Profile,
    metric: str | Score = "taylor",
    *,
    top: float,
    classes: Sequence[int] | None = None,
) -> Slice:
    """Of each site, for each class the neurons that contribute most to it.

    Args:
        profile, metric, top: as for ``global_slice``; of the profile class by class.
        classes: those whose neurons are wanted; all by default.

    Raises:
        ValueError, TypeError: as ``slice``, for ``top`` outside (0, 1], and for a class out of
            range.
    """
    _check_top("category_slice", top)
    chosen = checked_classes("category_slice", profile, classes)
    p = {name: site[chosen] for name, site in shares_of(profile, metric).items()}
    return _union(profile, p, top)


def _check_top(caller: str, top: float) -> None:
    if not 0 < top <= 1:
        raise ValueError(f"{caller}: top must lie in (0, 1], got {top}")


def _union(profile: Profile, p: dict[str, Tensor], top: float) -> Slice:
    return Slice(profile.graph, {name: heaviest(site, top).any(0) for name, site in p.items()})
