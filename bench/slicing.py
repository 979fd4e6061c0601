"""What slices answer without training, against how much of the model they leave out.

python -m bench.slicing            everything, writes bench/results/slicing.{md,json,png}
python -m bench.slicing --quick    MNIST, one metric, few images, nothing written

A long run continues where it was interrupted. Compared are four ways to choose neurons, each over
its own parameter: semantic slicing (critical sets merged over similar classes and layers) and the
plain union of critical sets over θ = 0.50 … 0.99, the top 10 … 100 % of each layer's neurons for
all classes together (global), and the union of each class's top 10 … 100 % (category). Compression
is the share of the model's parameters that do nothing while the slice is applied. Every slice is
one for all classes; "own" answers each class's images with that class's own top neurons, which
takes someone who knows the class. Accuracies between measured points are interpolated.

The last line is one JSON object: of semantic slicing per workload `vs_global` and `vs_category`,
the median over compression rates of its accuracy over the baseline's; above 1 it is better.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

import neusemslice as nss
from bench import cifar, mnist, report, semantics
from bench.report import Column, Ratio, Result, Section, Target
from bench.subjects import METRICS, Answers, Subject, cifar_subject, mnist_subject
from neusemslice.graph import Graph, Group, Site
from neusemslice.report.faithfulness import slice_at
from neusemslice.report.theta import THETAS as DEFAULT_THETAS
from neusemslice.slicing import parameters_in_use

THETAS = (0.5, 0.6, 0.7, 0.8, 0.85, *DEFAULT_THETAS)
TOPS = tuple(round(0.1 * step, 1) for step in range(1, 11))
WAYS = ("semantic", "union", "global", "category")
SHOWN = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
ENOUGH = 0.6
"""Accuracy below which a slice is of no use to anyone."""
PARTS, PROFILED, TESTED = 3, 3000, 2000

COLUMNS = (
    *(Column(f"at_{rate:g}", f"{rate:.0%} masked", "text") for rate in SHOWN),
    Column("vs_global", "of global's", "share", in_summary=True),
    Column("vs_category", "of category's", "share", in_summary=True),
    Column("below", "rates below either", "text"),
)
SCALE_COLUMNS = (
    Column("seconds", "s", "number"),
    Column("memory", "peak MiB", "number"),
    Column("components", "components", "number"),
    Column("purity", "of the kind", "share", in_summary=True),
)
ABOUT = (
    "What slices answer without training; accuracies in percent, mean ± standard deviation over "
    "profiles of disjoint\nrandom training images. See bench/slicing.py for the protocol."
)


@dataclass
class Curve:
    """Accuracy against compression, both ascending with the index of the point."""

    compression: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @classmethod
    def of(cls, points: list[tuple[float, float]]) -> Curve:
        """Points of equal compression are one, the mean."""
        rates = sorted({rate for rate, _ in points})
        means = [statistics.fmean(a for r, a in points if r == rate) for rate in rates]
        return cls(np.array(rates), np.array(means))

    def at(self, rates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Interpolated; NaN beyond the measured points."""
        return np.interp(rates, self.compression, self.accuracy, left=np.nan, right=np.nan)


def choices(subject: Subject, profile: nss.Profile, metric: str, way: str) -> Iterator[nss.Slice]:
    """The slices of one way."""
    if way == "global":
        yield from (nss.global_slice(profile, metric, top=top) for top in TOPS)
    elif way == "category":
        yield from (nss.category_slice(profile, metric, top=top) for top in TOPS)
    else:
        slicing = nss.slice(profile, metric)
        for theta in THETAS:
            if way == "semantic":
                yield slicing.merged_slice(subject.model, theta)
            else:
                yield slice_at(slicing, theta)


def compression(subject: Subject, kept: nss.Slice) -> float:
    whole = parameters_in_use(subject.model, nss.Slice.whole(kept.graph))
    return 1 - parameters_in_use(subject.model, kept) / whole


def curve(subject: Subject, profile: nss.Profile, metric: str, way: str, answers: Answers) -> Curve:
    return Curve.of(
        [
            (compression(subject, kept), float(answers.of(subject, kept).double().mean()))
            for kept in choices(subject, profile, metric, way)
        ]
    )


def own_curve(subject: Subject, profile: nss.Profile, metric: str, answers: Answers) -> Curve:
    """Each class answered with its own top neurons; compression is the mean over classes."""
    points = []
    for top in TOPS:
        kept = [
            nss.category_slice(profile, metric, top=top, classes=[k])
            for k in range(profile.num_classes)
        ]
        hits = [answers.of(subject.of_class(k), own) for k, own in enumerate(kept)]
        rate = statistics.fmean(compression(subject, own) for own in kept)
        points.append((rate, float(torch.cat(hits).double().mean())))
    return Curve.of(points)


Found = dict[tuple[str, str], list[Curve]]
"""Curves by metric and way, one for each profile."""


def study(
    subject: Subject, metrics: tuple[str, ...], profiles: list[nss.Profile], answers: Answers
) -> Found:
    found: Found = {}
    for metric in metrics:
        for way in WAYS:
            found[metric, way] = [
                curve(subject, profile, metric, way, answers) for profile in profiles
            ]
    found["taylor", "own"] = [own_curve(subject, profiles[0], "taylor", answers)]
    return found


def results(subject: Subject, found: Found) -> list[Result]:
    rows = []
    for (metric, way), curves in found.items():
        values: dict[str, object] = {}
        for rate in SHOWN:
            each = [float(c.at(np.array([rate]))[0]) for c in curves]
            if not np.isnan(each).any():
                spread = f" ± {100 * statistics.stdev(each):.1f}" if len(each) > 1 else ""
                values[f"at_{rate:g}"] = f"{100 * statistics.fmean(each):.1f}{spread}"
        if way == "semantic":
            values |= compared(curves, found[metric, "global"], found[metric, "category"])
        rows.append(Result(f"{subject.name}: {metric}, {way}", values))
    return rows


def compared(semantic: list[Curve], whole: list[Curve], category: list[Curve]) -> dict[str, object]:
    """Mean accuracy over that of each baseline, at each rate where one of the three is useful."""
    rates = np.arange(0.01, 1.0, 0.01)
    mine, *others = (
        np.mean([c.at(rates) for c in curves], axis=0) for curves in (semantic, whole, category)
    )
    values: dict[str, object] = {}
    below: set[int] = set()
    for name, other in zip(("vs_global", "vs_category"), others, strict=True):
        useful = ~np.isnan(mine) & ~np.isnan(other) & (np.fmax(mine, other) > ENOUGH)
        ratio = (mine / other)[useful]
        if len(ratio):
            values[name] = Ratio(float(np.median(ratio)), float(ratio.min()), float(ratio.max()))
        below |= {round(100 * rate) for rate in rates[useful][ratio < 1]}
    values["below"] = ", ".join(f"{rate} %" for rate in sorted(below)) or "none"
    return values


def draw(found: dict[str, Found], path: Path) -> None:
    """A row of panels for each model, one for each metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = sorted({metric for of in found.values() for metric, _ in of})
    figure = Figure(figsize=(3.1 * len(metrics), 3.2 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(found), len(metrics), sharex="row", sharey=True, squeeze=False)
    colours = dict(zip(WAYS, ("#c2703d", "#d9b38c", "#2f5d8a", "#7aa6c9"), strict=True))
    rates = np.arange(0, 1.0, 0.005)
    for row, (name, of) in zip(panels, found.items(), strict=True):
        for axis, metric in zip(row, metrics, strict=True):
            for way, colour in colours.items():
                each = 100 * np.array([c.at(rates) for c in of[metric, way]])
                middle, spread = each.mean(0), each.std(0)
                axis.plot(100 * rates, middle, color=colour, label=way, linewidth=1.6)
                axis.fill_between(
                    100 * rates, middle - spread, middle + spread, color=colour, alpha=0.2
                )
            if metric == "taylor":
                own = of["taylor", "own"][0]
                axis.plot(
                    100 * rates, 100 * own.at(rates), color="#888888", ls=":", label="own class's"
                )
            axis.axhline(100 * ENOUGH, color="#cccccc", linewidth=0.8, zorder=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{name}: {metric}", fontsize=9)
            axis.set_xlim(0, 70)
            axis.set_xlabel("parameters masked (%)", fontsize=8)
        row[0].set_ylabel("accuracy (%)", fontsize=8)
    handles, labels = panels[0][metrics.index("taylor")].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def big_profile(sites: int) -> tuple[nss.Profile, Tensor]:
    """A profile of neurons of 200 known kinds, from a fixed seed, and their kinds."""
    width, classes = 4000, 100
    names = [f"layer{i}" for i in range(sites)]
    graph = Graph(
        "0" * 32,
        classes,
        tuple(Site(name, width, i, (name,), (), (), ()) for i, name in enumerate(names)),
        tuple(Group((name,)) for name in names),
        (),
        (),
        {},
    )
    profile = nss.Profile.empty(graph, [str(k) for k in range(classes)], ("avg",))
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    stands = (uniform(200, classes) < 0.05).double()
    kinds = torch.randint(200, (sites, width), generator=generator)
    for name, own in zip(names, kinds, strict=True):
        stats = profile.activations[name]
        size = torch.randn(width, 1, dtype=torch.float64, generator=generator).exp()
        assert stats.mean is not None
        stats.mean.copy_(((stands[own] + 0.4 * uniform(width, classes)) * size).t())
        stats.count.fill_(100)
    return profile, kinds.flatten()


def slice_big(sites: int) -> tuple[float, float, int, float]:
    """Seconds of slicing, the process's peak memory in MiB, components, and their purity."""
    profile, kinds = big_profile(sites)
    begin = time.perf_counter()
    slicing = nss.slice(profile, "avg", 0.95)
    took = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    label = torch.cat(list(slicing.components.values()))
    pairs = torch.stack([label, kinds])[:, label >= 0]
    joint, counts = pairs.unique(dim=1, return_counts=True)
    best = torch.zeros(slicing.num_components, dtype=torch.int64)
    best.scatter_reduce_(0, joint[0], counts, "amax")
    return took, peak, slicing.num_components, float(best.sum() / pairs.shape[1])


def scale(quick: bool) -> Section:
    """In a process of its own, whose peak memory is then the slicing's."""
    sites = 5 if quick else 50
    done = subprocess.run(
        [sys.executable, "-c", f"from bench.slicing import slice_big; print(*slice_big({sites}))"],
        check=True,
        capture_output=True,
        text=True,
    )
    took, peak, components, purity = map(float, done.stdout.split())
    values = {
        "seconds": took,
        "memory": peak,
        "components": int(components),
        "purity": Ratio(purity, purity, purity),
    }
    note = (
        "nss.slice by avg, θ = 0.95, of a profile from a fixed seed; neurons are of 200 kinds. "
        "Memory: of the whole process, profile and libraries included. “of the kind”: share of the "
        "neurons that are of their component's most frequent kind."
    )
    name = f"{sites * 4000:,} neurons, 100 classes"
    return Section("slicing", "Slicing at scale", note, SCALE_COLUMNS, [Result(name, values)])


def subjects(quick: bool) -> list[Callable[[], Subject]]:
    images = 500 if quick else TESTED
    found: list[Callable[[], Subject]] = []
    if mnist.missing() is None:
        found.append(lambda: mnist_subject(images))
    if not quick and cifar.missing() is None:
        found.append(lambda: cifar_subject(images))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model, few images")
    quick = parser.parse_args().quick
    console = Console(width=160)
    metrics = ("taylor",) if quick else (*METRICS, "ens")
    collected = ("avg", "taylor") if quick else METRICS
    parts, profiled = (1, 500) if quick else (PARTS, PROFILED)
    answers = Answers(cifar.CACHE / f"slicing-answers{'-quick' * quick}.json")
    note = (
        f"{TESTED:,} test images; {PARTS} profiles of {PROFILED:,} training images each, none of "
        "them in two. “of global's”: "
        "semantic slicing's accuracy over the baseline's, median (least … greatest) over the "
        f"compression rates, in steps of 1 %, at which either is above {ENOUGH:.0%}; “rates below "
        "either”: where it is less."
    )
    curves = Section("curves", "Accuracy without training", note, COLUMNS, [])
    meaning = semantics.section()
    found: dict[str, Found] = {}
    for make in subjects(quick):
        subject = make()
        profiles = [subject.profile(part, profiled, collected) for part in range(parts)]
        found[subject.name] = study(subject, metrics, profiles, answers)
        curves.results += results(subject, found[subject.name])
        meaning.results += semantics.results(subject, profiled, answers, collected)
        console.print(f"{subject.name}: done", style="dim")
    big = scale(quick)
    for section in (curves, meaning, big):
        section.show(console)
    if not quick:
        about = {"torch": torch.__version__}
        target = Target("slicing", "Semantic slicing", ABOUT, "no compiler", about)
        for section in (curves, meaning):
            section.write(target)
        draw(found, report.RESULTS / "slicing.png")
        console.print(f"written: slicing.md, {big.write().name}")
    curves.results = [row for row in curves.results if "vs_global" in row.values]
    print(curves.summary())


if __name__ == "__main__":
    main()
