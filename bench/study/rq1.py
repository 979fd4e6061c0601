"""RQ1: how much of a network can be left out before its answers suffer, without any training.

Ways to choose neurons, each over its own parameter: semantic slicing (critical sets merged over
similar classes and layers) over θ, and the top shares of each layer's neurons for all classes
together (global) or as the union over classes (category-wise); by five measures of contribution.
The compression rate is the share of the parameters that do nothing while the slice is applied.

A row's mean is the area under the curve of accuracy over compression rates from 0 to 100 %, whose
ends are the whole network and an answer by chance. A seed stands for a network, and for the
training images that it is profiled with.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import neusemslice as nss
from bench.report import Column, Result, Section
from bench.runs import RUNS, Runs
from bench.slicing import choices, compression
from bench.study import figures
from bench.study.networks import DIGITS, NETWORKS, Network
from bench.study.outcome import SPREAD, Outcome, spread
from bench.subjects import METRICS, TEST_BATCH, Subject

WAYS = ("semantic", "global", "category")
SHOWN = (0.1, 0.2, 0.3, 0.4)
RATES = np.linspace(0, 1, 201)

COLUMNS = (
    *SPREAD,
    Column("ahead", "− best of global and category, points", "number", in_summary=True),
    *(Column(f"at_{rate:g}", f"{rate:.0%} masked", "number") for rate in SHOWN),
    Column("classes", "area per class %", "text"),
)


@dataclass(frozen=True)
class Size:
    """How much of everything the study has."""

    networks: tuple[Network, ...]
    metrics: tuple[str, ...]
    profiled: int
    tested: int


FULL = Size(NETWORKS, (*METRICS, "ens"), profiled=3_000, tested=2_000)
QUICK = Size((DIGITS,), ("avg", "taylor"), profiled=300, tested=200)


def subject(network: Network, seed: int, tested: int) -> Subject:
    """A trained network with the last so many test images."""
    data = network.data()
    return Subject(
        network.name,
        f"study-{network.name}-{network.epochs}-{seed}",
        network.trained(seed),
        data.classes,
        lambda chosen: (data.normalised(data.train.pixels[chosen]), data.train.labels[chosen]),
        len(data.train),
        data.batches(data.test[-tested:], TEST_BATCH),
    )


def curve(points: list[tuple[float, float]], whole: float, chance: float) -> NDArray[np.float64]:
    """Accuracy at ``RATES``, straight between measured points; those of one rate count as their
    mean."""
    ends = [(0.0, whole), (1.0, chance)]
    inner = [point for point in points if 0 < point[0] < 1]
    rates = sorted({rate for rate, _ in (*inner, *ends)})
    means = [statistics.mean(a for r, a in (*inner, *ends) if r == rate) for rate in rates]
    return np.interp(RATES, rates, means)


class Study(Runs):
    """All runs of one size."""

    def __init__(self, size: Size, kept: Path | None) -> None:
        super().__init__(kept)
        self.size = size
        self._subjects: dict[tuple[str, int], Subject] = {}

    def measured(self, network: Network, seed: int, metric: str, way: str) -> dict[str, Any]:
        """Rates, and the accuracy of each class at them; the whole network comes first."""
        given = self.subject(network, seed)
        profile = self.profile(given, seed)
        found = [nss.Slice.whole(profile.graph), *choices(given, profile, metric, way)]
        return {
            "rates": [round(compression(given, kept), 5) for kept in found],
            "classes": [by_class(given.right(kept), given.labels) for kept in found],
        }

    def subject(self, network: Network, seed: int) -> Subject:
        key = (network.name, seed)
        if key not in self._subjects:
            self._subjects = {key: subject(network, seed, self.size.tested)}
        return self._subjects[key]

    def profile(self, given: Subject, seed: int) -> nss.Profile:
        metrics = tuple(m for m in self.size.metrics if m != "ens")
        return given.profile(seed, self.size.profiled, metrics)

    def areas(
        self, network: Network, metric: str, way: str, seeds: range
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Curves ``[seeds, rates]``, and the area of each class ``[seeds, classes]``, percent."""
        curves, areas = [], []
        for seed in seeds:
            found = self.once(
                f"{network.name}, {network.epochs} epochs, {metric}, {way}, seed {seed}",
                partial(self.measured, network, seed, metric, way),
            )
            accuracies = np.array(found["classes"])
            chance = 1 / accuracies.shape[1]
            each = [
                100 * curve(list(zip(found["rates"], own, strict=True)), own[0], chance)
                for own in accuracies.T
            ]
            curves.append(np.mean(each, axis=0))
            areas.append([float(np.trapezoid(own, RATES)) for own in each])
        return np.array(curves), np.array(areas)


def by_class(right: Tensor, labels: Tensor) -> list[float]:
    """Share of each class's images."""
    return [round(float(right[labels == k].double().mean()), 5) for k in labels.unique().tolist()]


def run(quick: bool, seeds: int) -> Outcome:
    """The tables and the figure."""
    size = QUICK if quick else FULL
    study = Study(size, None if quick else RUNS / "study-rq1.json")
    networks = [network for network in size.networks if network.missing() is None]
    found = {
        (network.name, metric, way): study.areas(network, metric, way, range(seeds))
        for network in networks
        for metric in size.metrics
        for way in WAYS
    }
    results = []
    for (name, metric, way), (curves, areas) in found.items():
        values: dict[str, Any] = spread(areas.mean(1).tolist())
        if way == "semantic":
            rivals = [found[name, metric, other][1].mean() for other in WAYS[1:]]
            values["ahead"] = float(areas.mean() - max(rivals))
        for rate in SHOWN:
            values[f"at_{rate:g}"] = float(np.interp(rate, RATES, curves.mean(0)))
        values["classes"] = " ".join(f"{area:.1f}" for area in areas.mean(0))
        results.append(Result(f"{name}: {metric}, {way}", values))
    panels = {
        f"{name}: {metric}": {way: (100 * RATES, found[name, metric, way][0]) for way in WAYS}
        for name, metric in dict.fromkeys((name, metric) for name, metric, _ in found)
    }
    note = (
        f"Accuracy in percent without training, of {size.tested:,} test images; "
        f"{size.profiled:,} training images profiled. Mean: area under the curve of accuracy over "
        "the compression rate."
    )
    return Outcome(
        "RQ1: what slices answer without training, against how much they leave out",
        [Section("rq1", "Accuracy over compression", note, COLUMNS, results)],
        lambda path: figures.curves(
            panels, len(size.metrics), "parameters masked (%)", "accuracy (%)", path
        ),
    )
