"""How much room is left, and how much a new task is expected to need.

A class is described by its components: the mean, over a component's neurons, of how far the class
mean of each lies from the mean over the old classes, in units of the neuron's spread over old
samples. A new class reuses what the old class of most similar description has, to the share of
their cosine; what it does not reuse it needs anew. Where U neurons of a layer are critical to any
of K old classes, K' new ones are expected to need

    (1 - mean reuse) · K' · U / K

of its neurons. This is an estimate from how the old network sees new samples, made without
training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.maintain.freeing import needed, separable
from neusemslice.maintain.tasks import TaskSet
from neusemslice.profiling import Profile, batches, profile
from neusemslice.slicing import SemanticSlicing


@dataclass(frozen=True)
class SiteCapacity:
    """Room at one site.

    Attributes:
        site: its name.
        neurons: how many it has.
        free: how many no task has.
        expected: how many the new task is expected to need.
    """

    site: str
    neurons: int
    free: int
    expected: int


@dataclass(frozen=True)
class Capacity:
    """Room in a model for a new task.

    Attributes:
        sites: those that can be freed, in the order of the forward pass.
        reuse: per new class, by its number, the share that it is expected to reuse, in [0, 1].
    """

    sites: tuple[SiteCapacity, ...]
    reuse: dict[int, float]

    @property
    def free(self) -> int:
        """Free neurons of all sites."""
        return sum(site.free for site in self.sites)

    @property
    def expected(self) -> int:
        """Neurons that the new task is expected to need."""
        return sum(site.expected for site in self.sites)

    def __str__(self) -> str:
        short = [site.site for site in self.sites if site.free < site.expected]
        where = f"; too few are free at {', '.join(short)}" if short else ""
        return (
            f"{self.free:,} of {sum(s.neurons for s in self.sites):,} neurons are free, the new "
            f"task is expected to need {self.expected:,}{where}."
        )


def capacity_left(
    model: nn.Module,
    slicing: SemanticSlicing,
    loader: Iterable[Any],
    capacity: float | None = None,
) -> Capacity:
    """How many neurons are free, and how many new classes are expected to need.

    Args:
        model: as for ``extend``: the one that the slicing was made from, or a ``TaskSet`` that was
            made of it.
        slicing: of the old classes.
        loader: samples of the new classes, passed over twice.
        capacity: as for ``extend``, of a model that is no ``TaskSet``.

    Raises:
        ValueError: for a slicing of another model, or new samples with NaN or infinite activations.
    """
    backbone = model.backbone if isinstance(model, TaskSet) else model
    slicing.critical_slice().check_model(backbone)
    if isinstance(model, TaskSet):
        free = model.free
    else:
        free = ~needed(model, slicing, capacity, None, "capacity_left")
    found = torch.cat([labels.flatten() for _, labels in batches(loader, "capacity_left")])
    classes = [k for k in found.unique().tolist() if k >= 0]
    new = profile(backbone, loader, ("avg",), num_classes=1 + max(classes, default=0))
    if bad := new.nonfinite():
        raise ValueError(
            f"capacity_left: the new samples have NaN or infinite activations at {list(bad)}"
        )
    reuse = _reuse(slicing, new, classes)
    needs_anew = (1 - sum(reuse.values()) / max(1, len(reuse))) * len(reuse)
    old = int((slicing.profile.samples > 0).sum())
    return Capacity(
        tuple(
            SiteCapacity(
                site.name,
                site.neurons,
                int(free.mask(site.name).sum()),
                min(
                    site.neurons,
                    math.ceil(needs_anew * int(slicing.critical[site.name].any(0).sum()) / old),
                ),
            )
            for group in separable(free.graph)
            for site in map(free.graph.site, group.sites)
        ),
        reuse,
    )


def _reuse(slicing: SemanticSlicing, new: Profile, classes: list[int]) -> dict[int, float]:
    """Greatest cosine of each new class's description with an old one's."""
    known = (slicing.profile.samples > 0).nonzero().flatten().tolist()
    old = _descriptions(slicing, slicing.profile)[known]
    alike = torch.cosine_similarity(
        _descriptions(slicing, new)[classes].unsqueeze(1), old.unsqueeze(0), dim=-1
    )
    return dict(zip(classes, alike.amax(1).clamp(0, 1).tolist(), strict=True))


def _descriptions(slicing: SemanticSlicing, found: Profile) -> Tensor:
    """Each class by its components, float64 ``[K, components]``; see the module."""
    total = torch.zeros(found.num_classes, slicing.num_components, dtype=torch.float64)
    count = torch.zeros(slicing.num_components, dtype=torch.float64)
    for name, component in slicing.components.items():
        before = slicing.profile.activations[name]
        mean = found.activations[name].mean
        assert before.mean is not None
        assert mean is not None
        weight = (before.count / before.count.sum()).unsqueeze(1)
        centre = (weight * before.mean).sum(0)
        spread = (weight * (before.variance() + (before.mean - centre) ** 2)).sum(0).sqrt()
        moved = torch.where(spread > 0, (mean.to(spread.device) - centre) / spread, 0).cpu()
        inside = component >= 0
        total.index_add_(1, component[inside], moved[:, inside])
        count.index_add_(0, component[inside], torch.ones_like(count[component[inside]]))
    return total / count.clamp_min(1)
