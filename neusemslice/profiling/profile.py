"""A profile: streaming statistics of every site of a model, per class."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neusemslice import _files
from neusemslice.graph import Graph
from neusemslice.ops import (
    CONTRIBUTION_STATISTICS,
    STATISTICS,
    ClassStats,
    class_stats_merge_,
)

METRICS = ("avg", "var", "taylor", "deeplift")
"""Contribution metrics that a profile can be made for."""


@dataclass
class Profile:
    """Statistics of every site of a model, per class.

    Attributes:
        graph: the model's sites.
        class_names: one per class; ``K`` of them.
        metrics: the contribution metrics that the profile can give scores for.
        activations: per site, of the pooled activation ``a[n, c]``.
        contributions: per site, of the pooled ``a · g`` where ``g`` is the gradient of the
            sample's loss; empty without the metric "taylor".
        lifts: per site, of the pooled DeepLIFT contribution to the logit of the sample's class;
            empty without the metric "deeplift".
        baseline: what "deeplift" compares with; empty without it.
    """

    graph: Graph
    class_names: tuple[str, ...]
    metrics: tuple[str, ...]
    activations: dict[str, ClassStats]
    contributions: dict[str, ClassStats]
    lifts: dict[str, ClassStats] = field(default_factory=dict)
    baseline: str = ""

    @classmethod
    def empty(
        cls,
        graph: Graph,
        class_names: Iterable[str],
        metrics: Iterable[str],
        device: torch.device | str | None = None,
        baseline: str = "",
    ) -> Profile:
        """The profile of no sample."""
        names, wanted = tuple(class_names), tuple(metrics)

        def states(statistics: Iterable[str]) -> dict[str, ClassStats]:
            return {
                site.name: ClassStats.empty(len(names), site.neurons, statistics, device)
                for site in graph.sites
            }

        return cls(
            graph,
            names,
            wanted,
            states(STATISTICS),
            states(CONTRIBUTION_STATISTICS) if "taylor" in wanted else {},
            states(CONTRIBUTION_STATISTICS) if "deeplift" in wanted else {},
            baseline if "deeplift" in wanted else "",
        )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def samples(self) -> Tensor:
        """Samples seen of each class, float64 ``[K]``: the sum of their weights."""
        return next(iter(self.activations.values())).count

    def nonfinite(self) -> dict[str, int]:
        """Number of NaN or infinite values at each site that had any; waits for the device."""
        counts = {}
        for name in self.activations:
            states = (part[name] for part in self._parts().values() if name in part)
            total = sum(int(state.nonfinite.sum()) for state in states)
            if total:
                counts[name] = total
        return counts

    def overall(self) -> Profile:
        """The same samples as one class: scores and slices of it do not tell classes apart."""

        def joined(stats: dict[str, ClassStats]) -> dict[str, ClassStats]:
            return {name: _joined(state) for name, state in stats.items()}

        return Profile(
            self.graph,
            ("all",),
            self.metrics,
            joined(self.activations),
            joined(self.contributions),
            joined(self.lifts),
            self.baseline,
        )

    # Merging.

    def _parts(self) -> dict[str, dict[str, ClassStats]]:
        return {
            "activations": self.activations,
            "contributions": self.contributions,
            "lifts": self.lifts,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The statistics as a flat dict; the tensors are the profile's own."""
        return {
            f"{part}/{site}/{name}": tensor
            for part, stats in self._parts().items()
            for site, state in stats.items()
            for name, tensor in state.tensors().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies statistics in, as ``state_dict`` gave them.

        Raises:
            ValueError: naming a tensor that is missing or of another shape or dtype; nothing has
                changed then.
        """
        own = self.state_dict()
        for name, tensor in own.items():
            if name not in state:
                raise ValueError(f"the statistics lack {name}")
            given = state[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise ValueError(
                    f"{name} must be {tensor.dtype} {list(tensor.shape)}, "
                    f"got {given.dtype} {list(given.shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def merge(self, other: Profile) -> None:
        """Adds the samples of ``other`` to this profile, as if one had seen all of them.

        The other may be on another device, as one that was loaded is.

        Raises:
            ValueError: if the two are of different models, classes, metrics or baselines; nothing
                has changed then.
        """
        self._refuse_other("merge", other._subject())
        theirs = other._parts()
        for part, stats in self._parts().items():
            for name, state in stats.items():
                tensors = theirs[part][name].tensors()
                moved = {key: t.to(state.count.device) for key, t in tensors.items()}
                class_stats_merge_(state, ClassStats(**moved))

    def _subject(self) -> dict[str, Any]:
        """What two profiles must have in common to be merged."""
        return {
            "models": self.graph.fingerprint,
            "sites": sorted(self.activations),
            "classes": self.class_names,
            "metrics": sorted(self.metrics),
            "baselines": self.baseline,
        }

    def _refuse_other(self, caller: str, subject: dict[str, Any]) -> None:
        for what, mine in self._subject().items():
            if mine != subject[what]:
                raise ValueError(
                    f"{caller}: the profiles differ in their {what}: {mine} and {subject[what]}"
                )

    def __add__(self, other: Profile) -> Profile:
        """A new profile of the samples of both."""
        total = copy.deepcopy(self)
        total.merge(other)
        return total

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merges the profiles of all ranks, in the order of the ranks, into each of them.

        Every rank ends with the same bits.

        Raises:
            ValueError: as ``merge``, on every rank; nothing has changed then.
        """
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        subjects: list[Any] = [None] * world
        dist.all_gather_object(subjects, self._subject(), group=group)
        for subject in subjects:
            self._refuse_other("all_reduce", subject)
        own = copy.deepcopy(self)
        total = Profile.empty(
            self.graph,
            self.class_names,
            self.metrics,
            next(iter(self.state_dict().values())).device,
            self.baseline,
        )
        for source in range(world):
            part = own if source == rank else copy.deepcopy(total)
            for tensor in part.state_dict().values():
                dist.broadcast(tensor, group_src=source, group=group)
            total.merge(part)
        self.load_state_dict(total.state_dict())

    # Files.

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the profile to one file, atomically."""
        return _files.write(path, "profile", *self.to_file())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """
        return _files.read(path, "profile", cls.from_file)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON content that make up the profile."""
        content = {
            "graph": self.graph.to_json(),
            "class_names": list(self.class_names),
            "metrics": list(self.metrics),
            "baseline": self.baseline,
        }
        return self.state_dict(), content

    @classmethod
    def from_file(cls, tensors: dict[str, Tensor], content: dict[str, Any]) -> Profile:
        """The inverse of ``to_file``; other tensors and keys are left alone."""
        read = cls.empty(
            Graph.from_json(content["graph"]),
            (str(name) for name in content["class_names"]),
            (str(metric) for metric in content["metrics"]),
            baseline=str(content["baseline"]),
        )
        read.load_state_dict(tensors)
        return read


def _joined(state: ClassStats) -> ClassStats:
    """The state in which all classes are one."""
    joined = ClassStats(
        state.count.sum(0, keepdim=True),
        state.positions.sum(0, keepdim=True),
        state.nonfinite.clone(),
    )
    tiny = torch.finfo(torch.float64).tiny
    of_samples = (state.count / joined.count.clamp_min(tiny)).unsqueeze(1)
    of_positions = (state.positions / joined.positions.clamp_min(tiny)).unsqueeze(1)
    if state.mean is not None:
        joined.mean = (of_samples * state.mean).sum(0, keepdim=True)
        if state.m2 is not None:
            apart = state.count.unsqueeze(1) * (state.mean - joined.mean) ** 2
            joined.m2 = (state.m2 + apart).sum(0, keepdim=True)
    if state.mean_abs is not None:
        joined.mean_abs = (of_positions * state.mean_abs).sum(0, keepdim=True).float()
    if state.max is not None:
        joined.max = state.max.amax(0, keepdim=True)
    if state.active is not None:
        joined.active = (of_positions * state.active).sum(0, keepdim=True).float()
    return joined
