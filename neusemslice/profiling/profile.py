"""A profile: streaming statistics of every site of a model, per class."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
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

METRICS = ("avg", "var", "taylor")
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
    """

    graph: Graph
    class_names: tuple[str, ...]
    metrics: tuple[str, ...]
    activations: dict[str, ClassStats]
    contributions: dict[str, ClassStats]

    @classmethod
    def empty(
        cls,
        graph: Graph,
        class_names: Iterable[str],
        metrics: Iterable[str],
        device: torch.device | str | None = None,
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
        for name, stats in self.activations.items():
            total = int(stats.nonfinite.sum())
            if name in self.contributions:
                total += int(self.contributions[name].nonfinite.sum())
            if total:
                counts[name] = total
        return counts

    # Merging.

    def state_dict(self) -> dict[str, Tensor]:
        """The statistics as a flat dict; the tensors are the profile's own."""
        return {
            f"{part}/{site}/{name}": tensor
            for part, stats in (
                ("activations", self.activations),
                ("contributions", self.contributions),
            )
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

        Raises:
            ValueError: if the two are of different models, classes or metrics; nothing has changed
                then.
        """
        self._refuse_other("merge", other._subject())
        for name, state in self.activations.items():
            class_stats_merge_(state, other.activations[name])
        for name, state in self.contributions.items():
            class_stats_merge_(state, other.contributions[name])

    def _subject(self) -> dict[str, Any]:
        """What two profiles must have in common to be merged."""
        return {
            "models": self.graph.fingerprint,
            "sites": sorted(self.activations),
            "classes": self.class_names,
            "metrics": sorted(self.metrics),
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
        }
        return self.state_dict(), content

    @classmethod
    def from_file(cls, tensors: dict[str, Tensor], content: dict[str, Any]) -> Profile:
        """The inverse of ``to_file``; other tensors and keys are left alone."""
        read = cls.empty(
            Graph.from_json(content["graph"]),
            (str(name) for name in content["class_names"]),
            (str(metric) for metric in content["metrics"]),
        )
        read.load_state_dict(tensors)
        return read
