"""Do components and class groups mean something? Three measurements on real models.

Ablation: the largest components are masked one at a time. What they cost the classes that they
stand for is set against what they cost the other classes, and against what as many random neurons
of the same sites cost their own classes.

Groups: how much more alike the classes within two given groups are than classes of different
groups; the p-value is the share of all ways to split the classes into groups of these sizes that
separate them as well or better.

Stability: the adjusted Rand index of the components from two disjoint sets of samples, over the
neurons that are critical in both: 1 if they are the same, 0 as expected by chance.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

import neusemslice as nss
from bench.report import Column, Result, Section
from bench.subjects import Answers, Subject

THRESHOLD = 0.9
LARGEST, DRAWS = 8, 3
VEHICLES = frozenset({"airplane", "automobile", "ship", "truck"})
STABLE = ("taylor", "deeplift", "avg", "ens")

COLUMNS = (
    Column("components", "components", "number"),
    Column("own", "own classes lose %", "number"),
    Column("others", "others lose %", "number"),
    Column("random", "own lose by random %", "number"),
    Column("p", "p of the groups", "text"),
    Column("rand", "Rand index of halves", "number"),
)


@dataclass
class Ablation:
    """Accuracy lost, on average over components.

    Attributes:
        own: by the classes that the component stands for.
        others: by the other classes.
        random: by the component's own classes, to as many random neurons of each of its sites.
    """

    own: float
    others: float
    random: float


def ablation(
    subject: Subject,
    slicing: nss.SemanticSlicing,
    answers: Answers,
    largest: int = LARGEST,
    draws: int = DRAWS,
) -> Ablation:
    """Of the components of most neurons that stand for some classes and not for others."""
    graph = slicing.profile.graph
    names = slicing.profile.class_names
    whole = answers.of(subject, nss.Slice.whole(graph)).double()
    generator = torch.Generator().manual_seed(0)
    each = [slicing.component(i) for i in range(slicing.num_components)]
    telling = [c for c in each if c.classes and len(c.classes) < len(names)]
    rows = []
    for component in sorted(telling, key=lambda c: -c.neurons)[:largest]:
        members = slicing.component_slice(component.number)
        stands = torch.tensor([name in component.classes for name in names])[subject.labels]
        lost = whole - answers.of(subject, ~members).double()
        by_chance = [
            (whole - answers.of(subject, ~_shuffled(members, generator)).double())[stands].mean()
            for _ in range(draws)
        ]
        rows.append([lost[stands].mean(), lost[~stands].mean(), torch.stack(by_chance).mean()])
    own, others, random = torch.tensor(rows).mean(0).tolist()
    return Ablation(own, others, random)


def _shuffled(members: nss.Slice, generator: torch.Generator) -> nss.Slice:
    masks = {
        name: mask[torch.randperm(len(mask), generator=generator)]
        for name, mask in members.masks().items()
    }
    return nss.Slice(members.graph, masks)


def split_p_value(similarity: Tensor, group: Iterable[int]) -> float:
    """Share of the splits into groups of these sizes that separate the classes as well or better.

    Args:
        similarity: float ``[K, K]``, symmetric.
        group: the classes of one of the two groups.
    """
    alike = similarity.double()
    classes = len(alike)
    apart = ~torch.eye(classes, dtype=torch.bool)

    def separation(chosen: Iterable[int]) -> float:
        inside = torch.zeros(classes, dtype=torch.bool)
        inside[list(chosen)] = True
        same = inside.unsqueeze(0) == inside.unsqueeze(1)
        return float(alike[same & apart].mean() - alike[~same].mean())

    given = set(group)
    found = separation(given)
    every = [separation(chosen) for chosen in combinations(range(classes), len(given))]
    return sum(value >= found - 1e-12 for value in every) / len(every)


def agreement(a: nss.SemanticSlicing, b: nss.SemanticSlicing) -> float:
    """Adjusted Rand index of two slicings' components."""
    from sklearn.metrics import adjusted_rand_score

    first, second = (torch.cat([s.components[n] for n in a.components]) for s in (a, b))
    both = (first >= 0) & (second >= 0)
    return float(adjusted_rand_score(first[both], second[both]))


def section() -> Section:
    note = (
        f"By metric, θ = {THRESHOLD}. Lost: accuracy, of the {LARGEST} components of most neurons "
        f"that stand for some classes, one masked at a time; random: as many neurons of the same "
        f"sites, {DRAWS} draws. p: of animals against vehicles among all splits of ten classes "
        "into six and four. Rand index: adjusted, of the components from two disjoint sets of "
        "training images."
    )
    return Section("semantics", "What components and groups mean", note, COLUMNS, [])


def results(
    subject: Subject, profiled: int, answers: Answers, metrics: tuple[str, ...]
) -> list[Result]:
    """A row for each metric that profiles are made for, and the mean of their shares."""
    halves = [subject.profile(part, profiled, metrics) for part in (0, 1)]
    rows = []
    for metric in (m for m in STABLE if m in (*metrics, "ens")):
        one, other = (nss.slice(half, metric, THRESHOLD) for half in halves)
        lost = ablation(subject, one, answers)
        values: dict[str, object] = {
            "components": one.num_components,
            "own": 100 * lost.own,
            "others": 100 * lost.others,
            "random": 100 * lost.random,
            "rand": agreement(one, other),
        }
        if set(subject.classes) > VEHICLES:
            vehicles = [k for k, name in enumerate(subject.classes) if name in VEHICLES]
            values["p"] = f"{split_p_value(one.class_similarity, vehicles):.4f}"
        rows.append(Result(f"{subject.name}: {metric}", values))
    return rows
