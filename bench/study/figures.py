"""Figures of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS = ("#c2703d", "#2f5d8a", "#7aa6c9", "#6b8f4e", "#8c6bb1", "#999999")

Lines = Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
"""By what a line shows: x ``[P]``, and y ``[seeds, P]``."""


def curves(panels: Mapping[str, Lines], columns: int, x: str, y: str, path: Path) -> None:
    """Panels by title, in rows of so many; lines are means, bands standard deviations."""
    rows = -(-len(panels) // columns)
    figure = _figure(2.7 * columns, 2.4 * rows + 0.5)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for colour, (name, (at, values)) in zip(COLOURS, lines.items(), strict=False):
            middle, deviation = values.mean(0), deviations(values)
            axis.plot(at, middle, color=colour, label=name, linewidth=1.6)
            axis.fill_between(at, middle - deviation, middle + deviation, color=colour, alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(title, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel(x, fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel(y, fontsize=8)
    _save(figure, axes.flat[0], path)


Bars = Mapping[str, Mapping[str, Sequence[float]]]
"""By method, and by what a bar shows: a value for each seed."""


def bars(panels: Mapping[str, Bars], x: str, path: Path) -> None:
    """Panels by title, two abreast; a group of bars for each method, with standard deviations."""
    most = max(len(methods) for methods in panels.values())
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(5.5 * columns, (0.42 * most + 0.9) * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    kinds = {title: list(next(iter(methods.values()))) for title, methods in panels.items()}
    richest = max(kinds.values(), key=len)
    for axis, (title, methods) in zip(axes, panels.items(), strict=False):
        shown = kinds[title]
        height = 0.8 / len(shown)
        for number, kind in enumerate(shown):
            colour = COLOURS[richest.index(kind)]
            values = [methods[name][kind] for name in methods]
            axis.barh(
                np.arange(len(methods)) + (number - (len(shown) - 1) / 2) * height,
                [float(np.mean(v)) for v in values],
                height,
                xerr=[float(deviations(np.asarray(v))) for v in values],
                color=colour,
                label=kind,
                error_kw={"linewidth": 0.8},
            )
        axis.set_yticks(range(len(methods)), list(methods), fontsize=8)
        for label in axis.get_yticklabels():
            label.set_fontweight("bold" if label.get_text().startswith("ours") else "normal")
        axis.invert_yaxis()
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(x, fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    _save(figure, axes[list(kinds.values()).index(richest)], path)


def deviations(values: NDArray[Any]) -> NDArray[Any]:
    """Over seeds, as the tables have them; none of a single seed."""
    return np.std(values, axis=0, ddof=1 if len(values) > 1 else 0)


def _figure(width: float, height: float) -> Any:
    """An empty one, in inches, that no display shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, axis: Any, path: Path) -> None:
    """With the legend of one panel for all."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncol=len(labels), frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=110)
