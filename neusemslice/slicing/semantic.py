"""Semantic slicing: from a profile to critical sets, class groups and semantic components.

Classes are grouped by average linkage; how neurons are, see ``neusemslice.slicing.components``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from scipy.cluster import hierarchy
from torch import Tensor, nn

from neusemslice import _files
from neusemslice.ops import bitset_pack, bitset_similarity
from neusemslice.profiling import Profile
from neusemslice.slicing.budgets import within
from neusemslice.slicing.components import components
from neusemslice.slicing.explain import (
    ClassExplanation,
    Component,
    NeuronExplanation,
    component_of,
    component_weights,
    explain_class,
    explain_neuron,
)
from neusemslice.slicing.merging import merged_sets
from neusemslice.slicing.scores import Score, critical_sets, score_of, scored, shares
from neusemslice.slicing.size import neuron_sizes
from neusemslice.slicing.slice import Slice

GROUP_CUT = 0.7
"""Where the tree of classes is cut into groups, as a share of its height.

Relative to the tree, because critical sets of a narrow network overlap far more than those of a
wide one; 0.7 is where scipy's dendrogram starts new colours.
"""


@dataclass
class SemanticSlicing:
    """Which neurons are critical to which classes, and what belongs together.

    Attributes:
        profile: what it was made from.
        metric, threshold: how contribution was scored (of a function its name), and θ.
        shares: per site, contribution shares, float64 ``[K, C]``.
        critical: per site, critical sets, bool ``[K, C]``.
        class_similarity: Jaccard similarity of the classes' critical sets over all sites,
            float32 ``[K, K]``.
        class_groups: int64 ``[K]``, the group of each class.
        components: per site, int64 ``[C]``, the semantic component of each neuron; -1 where the
            neuron is critical to no class. Component 0 is the heaviest.
    """

    profile: Profile
    metric: str
    threshold: float
    shares: dict[str, Tensor]
    critical: dict[str, Tensor]
    class_similarity: Tensor
    class_groups: Tensor
    components: dict[str, Tensor]

    @property
    def num_components(self) -> int:
        return 1 + max((int(c.max()) for c in self.components.values() if c.numel()), default=-1)

    def critical_slice(self, classes: list[int] | None = None) -> Slice:
        """Neurons that are critical to any of the classes; to any class by default.

        Raises:
            ValueError: for a class out of range.
        """
        chosen = checked_classes("critical_slice", self.profile, classes)
        return Slice(
            self.profile.graph, {name: c[chosen].any(0) for name, c in self.critical.items()}
        )

    def slice(
        self,
        classes: Sequence[int] | None = None,
        *,
        per_site: float | None = None,
        whole: float | None = None,
        floor: int = 0,
    ) -> Slice:
        """The critical slice of some classes, cut to budgets.

        A budget leaves out the neurons that a lower θ would leave out.

        Args:
            classes: those whose neurons are wanted; all by default.
            per_site: at most this share of each site's neurons, rounded up.
            whole: at most this share of the model's neurons, rounded down.
            floor: at least so many neurons of each site, critical or not, or all that it has.

        Raises:
            ValueError: for a class out of range, a share outside (0, 1], a negative floor, or a
                floor that a budget does not hold.
        """
        chosen = checked_classes("slice", self.profile, classes)
        wanted = {name: c[chosen].any(0) for name, c in self.critical.items()}
        p = {name: site[chosen] for name, site in self.shares.items()}
        return Slice(self.profile.graph, within(wanted, p, per_site, whole, floor))

    def merged_slice(
        self, model: nn.Module, threshold: float | None = None, *, floor: int = 1
    ) -> Slice:
        """The critical sets, merged over similar classes (``class_groups``) and over all layers.

        For each group the neurons of greatest share for their parameters, until θ of the group's
        contribution over all sites is kept: far smaller than ``critical_slice`` at equal accuracy.
        See ``neusemslice.slicing.merging``.

        Args:
            model: that the slicing was made for; its parameters are counted.
            threshold: θ in (0, 1]; the slicing's own by default.
            floor: at least so many neurons of each site, the heaviest, or all that it has.

        Raises:
            ValueError: for a model of another structure, θ outside (0, 1], or a negative floor.
        """
        theta = self.threshold if threshold is None else threshold
        if not 0 < theta <= 1:
            raise ValueError(f"merged_slice: threshold must lie in (0, 1], got {theta}")
        if floor < 0:
            raise ValueError(f"merged_slice: floor must not be negative, got {floor}")
        graph = self.profile.graph
        Slice.whole(graph).check_model(model)
        merged = merged_sets(self.shares, self.class_groups, neuron_sizes(model, graph), theta)
        for name, mask in merged.items():
            mask[self.importance(name).sort(descending=True, stable=True).indices[:floor]] = True
        return Slice(graph, merged)

    def component_slice(self, component: int) -> Slice:
        """The neurons of one semantic component."""
        return Slice(
            self.profile.graph, {name: c == component for name, c in self.components.items()}
        )

    @cached_property
    def component_weights(self) -> Tensor:
        """Share of each class's contribution that goes through each component.

        The mean over sites, float64 ``[components, K]``.
        """
        return component_weights(self)

    def component(self, number: int) -> Component:
        """A component's neurons, sites, classes and weight.

        Raises:
            IndexError: if there is none of that number.
        """
        if not 0 <= number < self.num_components:
            raise IndexError(f"component: numbers lie in [0, {self.num_components}), got {number}")
        return component_of(self, number, self.component_weights[number])

    @overload
    def explain(self, subject: int | str) -> ClassExplanation: ...

    @overload
    def explain(self, subject: tuple[str, int]) -> NeuronExplanation: ...

    def explain(self, subject: int | str | tuple[str, int]) -> ClassExplanation | NeuronExplanation:
        """What a class needs, or what a neuron stands for; ``print`` it to read it.

        Args:
            subject: a class by number or name, or a neuron as its site and its index there.

        Raises:
            KeyError: for a site or a class name that there is none of.
            ValueError: for a class out of range.
            IndexError: for a neuron out of range, naming its site.
        """
        if isinstance(subject, tuple):
            site, neuron = subject
            neurons = self.profile.graph.site(site).neurons
            if not 0 <= neuron < neurons:
                raise IndexError(
                    f"explain: neurons of site {site} lie in [0, {neurons}), got {neuron}"
                )
            return explain_neuron(self, site, neuron)
        if isinstance(subject, str):
            names = self.profile.class_names
            if subject not in names:
                raise KeyError(f"explain: no class {subject!r}; there are {', '.join(names)}")
            subject = names.index(subject)
        return explain_class(self, checked_classes("explain", self.profile, [subject])[0])

    def importance(self, site: str) -> Tensor:
        """Each neuron's share in the class to which it matters most, float64 ``[C]``."""
        p = self.shares[site]
        return p.amax(0) if p.shape[0] else p.new_zeros(p.shape[1])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the slicing and the profile that it was made from to one file, atomically."""
        tensors, content = self.profile.to_file()
        tensors |= {f"components/{name}": c for name, c in self.components.items()}
        tensors |= {f"shares/{name}": p for name, p in self.shares.items()}
        tensors["class_similarity"] = self.class_similarity
        tensors["class_groups"] = self.class_groups
        content |= {"metric": self.metric, "threshold": self.threshold}
        return _files.write(path, "slicing", tensors, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SemanticSlicing:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """

        def build(tensors: dict[str, Tensor], content: dict[str, Any]) -> SemanticSlicing:
            profile = Profile.from_file(tensors, content)
            threshold = float(content["threshold"])
            p = {s.name: tensors[f"shares/{s.name}"] for s in profile.graph.sites}
            return cls(
                profile=profile,
                metric=str(content["metric"]),
                threshold=threshold,
                shares=p,
                critical={name: critical_sets(site, threshold) for name, site in p.items()},
                class_similarity=tensors["class_similarity"],
                class_groups=tensors["class_groups"],
                components={s.name: tensors[f"components/{s.name}"] for s in profile.graph.sites},
            )

        return _files.read(path, "slicing", build)


def slice_profile(
    profile: Profile, metric: str | Score = "taylor", threshold: float = 0.95
) -> SemanticSlicing:
    """Slices a profile semantically.

    Args:
        profile: what ``neusemslice.profile`` gave.
        metric: how contribution is scored: one that the profile was made for, "ens", or a function
            of your own (see ``neusemslice.slicing.scores``).
        threshold: θ in (0, 1], the share of a class's contribution that its critical set reaches.

    Raises:
        ValueError: for a metric that the profile does not have, θ outside (0, 1], a profile
            without samples, or one that met NaN or infinite activations (the message names the
            site and the count); for a function that gives no scores (the message names it).
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"slice: threshold must lie in (0, 1], got {threshold}")
    p = shares_of(profile, metric)
    critical = {name: critical_sets(site, threshold) for name, site in p.items()}
    sets = torch.cat([critical[s.name] for s in profile.graph.sites], dim=1)
    similarity = bitset_similarity(bitset_pack(sets), metric="jaccard")
    return SemanticSlicing(
        profile=profile,
        metric=metric if isinstance(metric, str) else getattr(metric, "__name__", repr(metric)),
        threshold=threshold,
        shares=p,
        critical=critical,
        class_similarity=similarity,
        class_groups=_class_groups(similarity),
        components=components(p, critical),
    )


def shares_of(profile: Profile, metric: str | Score) -> dict[str, Tensor]:
    """Per site the classes' shares of contribution, float64 ``[K, C]``.

    Raises:
        ValueError, TypeError: as ``slice_profile``.
    """
    score = score_of(profile, metric)
    if bad := profile.nonfinite():
        listed = ", ".join(f"{name} ({count})" for name, count in bad.items())
        raise ValueError(f"slice: the profile met activations that are NaN or infinite at {listed}")
    if not bool((profile.samples > 0).any()):
        raise ValueError("slice: the profile has no sample of any class")
    return {s.name: shares(scored(profile, score, s.name)) for s in profile.graph.sites}


def checked_classes(caller: str, profile: Profile, classes: Sequence[int] | None) -> list[int]:
    """The classes, all by default.

    Raises:
        ValueError: for a class out of range.
    """
    k = profile.num_classes
    chosen = list(range(k)) if classes is None else list(classes)
    for number in chosen:
        if not 0 <= number < k:
            raise ValueError(f"{caller}: classes must lie in [0, {k}), got {number}")
    return chosen


def _class_groups(similarity: Tensor) -> Tensor:
    """Groups of classes by average linkage, numbered from 0."""
    k = similarity.shape[0]
    if k < 2:
        return torch.zeros(k, dtype=torch.int64)
    upper = np.triu_indices(k, 1)
    distances = 1.0 - similarity.double().numpy()[upper]
    tree = hierarchy.linkage(distances, method="average")
    groups = hierarchy.fcluster(tree, t=GROUP_CUT * tree[-1, 2], criterion="distance")
    return torch.from_numpy(groups.astype(np.int64) - 1)
