"""What a slicing says of one class, one neuron or one component: numbers, and words from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from neusemslice.slicing.semantic import SemanticSlicing

_NAMED = 3
"""How many items a sentence names."""


@dataclass(frozen=True)
class Component:
    """A semantic component.

    Attributes:
        number: of the component.
        neurons: how many it has.
        sites: how many of them each site has; sites without any are left out.
        weights: per class the share of its contribution that goes through these neurons, the mean
            over all sites.
        classes: those for which its weight is above the mean over classes, by at least half as
            much as the one that is most so; the greatest weight first.
    """

    number: int
    neurons: int
    sites: dict[str, int]
    weights: dict[str, float]
    classes: tuple[str, ...]

    @property
    def weight(self) -> float:
        """The mean of ``weights``; those of all components and uncritical neurons add up to 1."""
        return sum(self.weights.values()) / max(1, len(self.weights))

    def __str__(self) -> str:
        stands = f", above all of {_listed(self.classes)}" if self.classes else ""
        return (
            f"Component {self.number}: {_count(self.neurons, 'neuron')} of "
            f"{_count(len(self.sites), 'site')} carry {self.weight:.1%} of all contribution"
            f"{stands}."
        )


@dataclass(frozen=True)
class NeuronExplanation:
    """What one neuron stands for.

    Attributes:
        site, neuron: which one.
        neurons: of its site.
        shares: per class, its share of the site's contribution.
        critical: the classes to which it is critical, in their order.
        component: the semantic component that it belongs to; none if it is critical to no class.
    """

    site: str
    neuron: int
    neurons: int
    shares: dict[str, float]
    critical: tuple[str, ...]
    component: Component | None

    def __str__(self) -> str:
        most = sorted(self.shares, key=lambda name: -self.shares[name])[:_NAMED]
        listed = [
            f"{name} ({self.shares[name]:.1%} of the site's contribution, "
            f"{self.shares[name] * self.neurons:.1f} times an average neuron's)"
            for name in most
            if self.shares[name] > 0
        ]
        matters = f"It matters most to {', then '.join(listed)}." if listed else "It is idle."
        which = f": {_listed(self.critical)}" if 0 < len(self.critical) < len(self.shares) else ""
        ends = "" if self.component is None else f" {self.component}"
        return (
            f"Neuron {self.neuron} of {self.neurons} at site {self.site} is critical to "
            f"{len(self.critical)} of {_count(len(self.shares), 'class')}{which}. {matters}{ends}"
        )


@dataclass(frozen=True)
class ClassExplanation:
    """What one class needs.

    Attributes:
        name: of the class.
        samples: that were profiled; the sum of their weights.
        threshold: θ, the share of its contribution that its critical neurons carry at each site.
        neurons: of all sites.
        critical: per site the number of neurons critical to it.
        own: per site the number of neurons critical to it and to no other class.
        group: the other classes of its group.
        similar: Jaccard similarity of its critical set to every other class's, greatest first.
        components: those that carry most of its contribution, heaviest first.
    """

    name: str
    samples: float
    threshold: float
    neurons: int
    critical: dict[str, int]
    own: dict[str, int]
    group: tuple[str, ...]
    similar: dict[str, float]
    components: tuple[Component, ...]

    def __str__(self) -> str:
        if not self.samples:
            return (
                f"Class {self.name} has no sample in the profile, so no neuron is critical to it."
            )
        total = sum(self.critical.values())
        parts = [
            f"Class {self.name} ({self.samples:g} samples) needs "
            f"{total} of {_count(self.neurons, 'neuron')} ({total / max(1, self.neurons):.1%}) for "
            f"{self.threshold:.0%} of its contribution at each site; "
            f"{sum(self.own.values())} of them matter to no other class."
        ]
        if self.similar:
            near = [f"{name} ({s:.0%})" for name, s in list(self.similar.items())[:_NAMED]]
            parts.append(f"Its critical set overlaps most with those of {_listed(near)}.")
            grouped = f"together with {_listed(self.group)}" if self.group else "alone"
            parts.append(f"It is grouped {grouped}.")
        parts += [
            f"{component.weights[self.name]:.1%} of its contribution go through component "
            f"{component.number} ({_count(component.neurons, 'neuron')})."
            for component in self.components[:1]
        ]
        return " ".join(parts)


def component_of(slicing: SemanticSlicing, number: int, weights: Tensor) -> Component:
    """One component, ``weights`` being its share of each class's contribution, ``[K]``."""
    names = slicing.profile.class_names
    above = weights - weights.mean() if len(weights) else weights
    order = above.sort(descending=True, stable=True).indices.tolist()
    # A component without a preference is above its mean by rounding only.
    least = max(float(above.amax()) / 2, 1e-9 * float(weights.amax())) if len(weights) else 0.0
    counts = {site: int((c == number).sum()) for site, c in slicing.components.items()}
    return Component(
        number=number,
        neurons=sum(counts.values()),
        sites={site: count for site, count in counts.items() if count},
        weights=dict(zip(names, weights.tolist(), strict=True)),
        classes=tuple(names[k] for k in order if above[k] >= least and above[k] > 0),
    )


def explain_neuron(slicing: SemanticSlicing, site: str, neuron: int) -> NeuronExplanation:
    """What a neuron stands for."""
    names = slicing.profile.class_names
    critical = slicing.critical[site][:, neuron].tolist()
    component = int(slicing.components[site][neuron])
    return NeuronExplanation(
        site=site,
        neuron=neuron,
        neurons=slicing.critical[site].shape[1],
        shares=dict(zip(names, slicing.shares[site][:, neuron].tolist(), strict=True)),
        critical=tuple(name for name, needs in zip(names, critical, strict=True) if needs),
        component=slicing.component(component) if component >= 0 else None,
    )


def explain_class(slicing: SemanticSlicing, number: int) -> ClassExplanation:
    """What a class needs."""
    profile = slicing.profile
    names = profile.class_names
    similar = slicing.class_similarity[number].sort(descending=True, stable=True)
    others = [
        (k, s)
        for k, s in zip(similar.indices.tolist(), similar.values.tolist(), strict=True)
        if k != number
    ]
    group = slicing.class_groups == slicing.class_groups[number]
    group[number] = False
    heaviest = slicing.component_weights[:, number].sort(descending=True, stable=True)
    chosen = heaviest.indices[heaviest.values > 0][:_NAMED]
    return ClassExplanation(
        name=names[number],
        samples=float(profile.samples[number]),
        threshold=slicing.threshold,
        neurons=profile.graph.neurons,
        critical={site: int(c[number].sum()) for site, c in slicing.critical.items()},
        own={
            site: int((c[number] & (c.sum(0) == 1)).sum()) for site, c in slicing.critical.items()
        },
        group=tuple(names[k] for k in group.nonzero().flatten().tolist()),
        similar={names[k]: s for k, s in others},
        components=tuple(slicing.component(i) for i in chosen.tolist()),
    )


def component_weights(slicing: SemanticSlicing) -> Tensor:
    """Per component and class the share of contribution, mean over sites, float64 ``[.., K]``."""
    total = torch.zeros(slicing.num_components, slicing.profile.num_classes, dtype=torch.float64)
    for site, component in slicing.components.items():
        inside = component >= 0
        total.index_add_(0, component[inside], slicing.shares[site].t()[inside])
    return total / max(1, len(slicing.components))


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}es" if noun.endswith("s") else f"{number:,} {noun}s"


def _listed(items: Sequence[str]) -> str:
    """The first of some items as a list in a sentence."""
    if len(items) > _NAMED:
        return f"{', '.join(items[:_NAMED])} and {len(items) - _NAMED} more"
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
