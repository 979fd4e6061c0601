"""Figures of a slicing, of its faithfulness and its θ, and of the demo's outcome."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neusemslice.report.outcome import Outcome
from neusemslice.slicing import SemanticSlicing

if TYPE_CHECKING:
    from neusemslice.report.faithfulness import Faithfulness
    from neusemslice.report.theta import ThetaCurve

_MAIN, _LIGHT, _OTHER = "#2f5d8a", "#b9cbdd", "#c2703d"


@contextmanager
def _figure(path: Path, width: float, height: float, columns: int) -> Iterator[Any]:
    """Axes side by side; written to ``path`` at the end."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures are drawn with matplotlib; pip install 'neusemslice[demo]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.savefig(path, dpi=150)


def plot_slicing(slicing: SemanticSlicing, path: Path) -> None:
    """Class overlap as a heat map, and per site how many classes its neurons are critical to."""
    names = slicing.profile.class_names
    with _figure(path, 11, 4.6, 2) as (overlap, bars):
        image = overlap.imshow(slicing.class_similarity, cmap="Blues")
        overlap.set_xticks(range(len(names)), names)
        overlap.set_yticks(range(len(names)), names)
        overlap.set_xlabel("class")
        overlap.set_ylabel("class")
        overlap.set_title("Overlap of critical sets (Jaccard)")
        overlap.figure.colorbar(image, ax=overlap, shrink=0.8)

        sites = list(slicing.critical)
        everywhere, some, none = [], [], []
        for critical in slicing.critical.values():
            classes = critical.sum(0)
            total = critical.shape[1]
            everywhere.append(int((classes == len(names)).sum()) / total)
            none.append(int((classes == 0).sum()) / total)
            some.append(1 - everywhere[-1] - none[-1])
        at = torch.arange(len(sites))
        left = torch.zeros(len(sites))
        for label, part, colour in (
            ("all classes", everywhere, _MAIN),
            ("some classes", some, _LIGHT),
            ("no class", none, "#eeeeee"),
        ):
            bars.barh(at, part, left=left, color=colour, label=label)
            left = left + torch.tensor(part)
        bars.set_yticks(at, sites)
        bars.invert_yaxis()
        bars.set_xlim(0, 1)
        bars.set_xlabel("share of the site's neurons")
        bars.set_title(f"Critical at θ = {slicing.threshold:g} ({slicing.metric})", pad=26)
        bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False)


def plot_faithfulness(found: Faithfulness, path: Path) -> None:
    """Accuracy against θ, and by class at the θ where the slice is furthest above chance."""
    chance, deviation = found.chance()
    kept, dropped = found.over_classes(found.kept), found.over_classes(found.dropped)
    with _figure(path, 11, 4.4, 2) as (lines, bars):
        at = list(range(len(found.thresholds)))
        whole = float(found.over_classes(found.whole))
        lines.axhline(whole, color="#999999", linewidth=1, linestyle="--", label="whole model")
        band = deviation.nan_to_num()
        lines.fill_between(at, chance - band, chance + band, color=_LIGHT, linewidth=0)
        for name, values, colour in (
            ("slice", kept, _MAIN),
            ("random, equal size", chance, "#7f9cb8"),
            ("complement", dropped, _OTHER),
        ):
            lines.plot(at, values, marker="o", color=colour, label=name)
        lines.set_xticks(
            at,
            [
                f"{threshold:.3g}\n{float(share):.0%}"
                for threshold, share in zip(found.thresholds, found.density, strict=True)
            ],
        )
        lines.set_xlabel("threshold θ, and the slice's share of the neurons")
        lines.set_ylim(0, 1.02)
        lines.set_ylabel("accuracy")
        lines.set_title(f"What slices by {found.metric} answer alone", pad=26)
        lines.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=4, frameon=False, fontsize=8
        )

        best = int((kept - chance).argmax())
        classes = range(len(found.class_names))
        for offset, name, values, colour in (
            (-0.27, "slice", found.kept[best], _MAIN),
            (0.0, "random, equal size", found.random[best].mean(0), _LIGHT),
            (0.27, "complement", found.dropped[best], _OTHER),
        ):
            places = [k + offset for k in classes]
            bars.bar(places, values.tolist(), 0.26, color=colour, label=name)
        longest = max(map(len, found.class_names))
        turned = {"rotation": 45, "ha": "right"} if longest > 3 else {}
        bars.set_xticks(classes, found.class_names, fontsize=8, **turned)
        bars.set_ylim(0, 1.02)
        bars.set_ylabel("accuracy")
        bars.set_title(f"By class at θ = {found.thresholds[best]:.3g}", pad=26)
        bars.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False, fontsize=8
        )


def plot_theta_curve(found: ThetaCurve, path: Path) -> None:
    """Accuracy of the critical neurons against their number, over θ, with the knee marked."""
    density, kept = found.density.tolist(), found.kept.tolist()
    with _figure(path, 6.5, 4.4, 1) as axis:
        axis.axhline(found.whole, color=_LIGHT, label="all neurons")
        axis.plot(density, kept, color=_MAIN, marker="o", markersize=4, label="critical neurons")
        axis.plot(
            density[found.knee],
            kept[found.knee],
            color=_OTHER,
            marker="o",
            markersize=9,
            linestyle="none",
            label=f"knee, θ = {found.thresholds[found.knee]:g}",
        )
        for i in sorted({0, len(kept) - 1} - {found.knee}):
            text = f"θ = {found.thresholds[i]:g}"
            axis.annotate(
                text, (density[i], kept[i]), xytext=(6, -12), textcoords="offset points", fontsize=8
            )
        axis.set_xlabel("share of the model's neurons")
        axis.set_ylabel("accuracy")
        axis.set_title(f"What the critical neurons answer alone ({found.metric})")
        axis.margins(x=0.12, y=0.12)
        axis.legend(frameon=False, fontsize=8, loc="lower right")


def plot_outcome(outcome: Outcome, path: Path) -> None:
    """Accuracy and cost before and after each maintenance task."""
    with _figure(path, 11, 4.2, 2) as (accuracy, cost):
        full = f"shifted digits\n(full tuning: {outcome.shifted_full:.0%})"
        groups = (
            ("restructured\nall digits", outcome.trained, outcome.restructured),
            (f"re-adapted\n{full}", outcome.shifted_before, outcome.shifted_after),
            ("extended\nold digits", outcome.old_original, outcome.old_masked),
            ("extended\nnew digits", math.nan, outcome.new),
        )
        _pairs(accuracy, [label for label, *_ in groups], [g[1:] for g in groups])
        accuracy.set_ylim(0, 1.12)
        accuracy.set_ylabel("accuracy on held-out images")
        accuracy.set_title("What the model answers")

        before, after = outcome.cost_before, outcome.cost_after
        shares = [
            after.parameters / before.parameters,
            after.macs / before.macs,
            after.latency[64] / before.latency[64],
            outcome.tuned_bytes / outcome.full_bytes,
        ]
        labels = [
            "parameters\nrestructured",
            "multiply-adds\nrestructured",
            "latency\nrestructured",
            "optimizer state\nre-adapted",
        ]
        _pairs(cost, labels, [(1.0, share) for share in shares])
        cost.set_ylim(0, 1.12)
        cost.set_ylabel("share of before (or of full fine-tuning)")
        cost.set_title("What it costs")


def _pairs(axis: Any, labels: list[str], pairs: list[Any]) -> None:
    """Bars before and after, with the value on each."""
    at = torch.arange(len(labels))
    for offset, index, colour, name in ((-0.2, 0, _LIGHT, "before"), (0.2, 1, _MAIN, "after")):
        values = [pair[index] for pair in pairs]
        bars = axis.bar(at + offset, values, 0.38, color=colour, label=name)
        texts = ["" if math.isnan(value) else f"{value:.0%}" for value in values]
        axis.bar_label(bars, texts, fontsize=8)
    axis.set_xticks(at, labels, fontsize=8)
    axis.legend(frameon=False, fontsize=8, loc="upper right", ncol=2)
