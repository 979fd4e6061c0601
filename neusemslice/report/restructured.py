"""What restructuring did, as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from neusemslice.graph import evaluation
from neusemslice.maintain import Cost, Restructured
from neusemslice.profiling import LabelsOf
from neusemslice.report.faithfulness import count_right
from neusemslice.slicing import Component, SemanticSlicing, Slice

_LISTED = 20
"""Of more classes or components a table shows those that lose most."""


@dataclass(frozen=True)
class ClassAccuracy:
    """How well two models answer, class by class.

    Attributes:
        class_names: of all classes.
        samples: of each class, int64 ``[K]``.
        before, after: right answers of either model, int64 ``[K]``.
    """

    class_names: tuple[str, ...]
    samples: Tensor
    before: Tensor
    after: Tensor

    @property
    def overall(self) -> tuple[float, float]:
        """Share of right answers over all samples, before and after."""
        total = int(self.samples.sum())
        return int(self.before.sum()) / total, int(self.after.sum()) / total

    def change(self) -> Tensor:
        """By how much each class's share of right answers rose, float64 ``[K]``; NaN if absent."""
        return (self.after - self.before).double() / self.samples


def class_accuracy(
    before: nn.Module,
    after: nn.Module,
    loader: Iterable[Any],
    class_names: Sequence[str],
    labels: LabelsOf | None = None,
) -> ClassAccuracy:
    """Scores two models on the same labelled samples, in evaluation mode.

    Args:
        before, after: with logits over all classes.
        loader: batches as for ``neusemslice.profile``; gone through twice.
        class_names: of all classes.
        labels: for batches of another form; takes a batch and returns its labels.

    Raises:
        ValueError: for a loader that can be gone through only once or has no labelled sample, and
            for labels out of range or that do not fit the models' answers.
    """
    if iter(loader) is loader:
        raise ValueError(
            "class_accuracy: the loader is gone through once for each model, but an iterator is "
            "used up after one"
        )
    found = []
    for model in (before, after):
        with evaluation(model), torch.no_grad():
            found.append(count_right("class_accuracy", model, loader, len(class_names), labels))
    (right_before, samples), (right_after, _) = found
    return ClassAccuracy(tuple(class_names), samples, right_before, right_after)


def removed_components(slicing: SemanticSlicing, kept: Slice) -> list[tuple[Component, int]]:
    """Semantic components and how many of their neurons are not in a slice.

    Those that lost the greatest share come first.

    Raises:
        ValueError: for a slice of another model.
    """
    whole = Slice.whole(slicing.profile.graph)
    removed = torch.zeros(slicing.num_components, dtype=torch.int64)
    for name, mask in (whole - kept).masks().items():
        numbers = slicing.components[name][mask]
        removed += numbers[numbers >= 0].bincount(minlength=len(removed))
    found = [(slicing.component(i), count) for i, count in enumerate(removed.tolist())]
    return sorted(found, key=lambda item: -item[1] / item[0].neurons)


def restructured_table(result: Restructured, accuracy: ClassAccuracy | None = None) -> Table:
    """What the model cost and costs, and how well it answers, over all classes and one by one."""
    table = _table("Restructured", "", "before", "after", "left")
    if accuracy is not None:
        before, after = accuracy.overall
        samples = int(accuracy.samples.sum())
        table.add_row(f"accuracy on {samples:,} samples", f"{before:.1%}", f"{after:.1%}", "")
        _add_classes(table, accuracy)
        table.add_section()
    report = result.report
    for name, before, after, unit in _costs(report.before, report.after):
        left = f"{after / before:.0%}" if before else ""
        table.add_row(name, unit(before), unit(after), left)
    return table


def widths_table(result: Restructured) -> Table:
    """Per site how many neurons there were and are."""
    table = _table("Widths", "site", "before", "after", "left")
    widths = result.report.widths
    for site, (before, after) in widths.items():
        table.add_row(site, f"{before:,}", f"{after:,}", f"{after / before:.0%}")
    before, after = (sum(pair[i] for pair in widths.values()) for i in (0, 1))
    table.add_section()
    table.add_row("all", f"{before:,}", f"{after:,}", f"{after / max(1, before):.0%}")
    return table


def refits_table(result: Restructured) -> Table:
    """Per layer that compensation fitted, the share of its answer's variance that it missed."""
    table = _table("Compensated: variance missed", "layer", "before", "after")
    for layer, refit in result.report.refits.items():
        table.add_row(layer, f"{refit.before:.2%}", f"{refit.after:.2%}")
    return table


def components_table(slicing: SemanticSlicing, kept: Slice) -> Table:
    """Which semantic components went: those that lost the greatest share of their neurons first."""
    table = _table("Semantic components", "component", "neurons", "removed", "share", "stands for")
    found = removed_components(slicing, kept)
    for component, count in found[:_LISTED]:
        table.add_row(
            f"{component.number}",
            f"{component.neurons:,}",
            f"{count:,}",
            f"{count / component.neurons:.0%}",
            ", ".join(component.classes[:3]),
        )
    if (more := len(found) - _LISTED) > 0:
        table.add_row(f"{more} more", "", f"{sum(count for _, count in found[_LISTED:]):,}", "")
    table.columns[-1].justify = "left"
    return table


def print_restructured(
    result: Restructured,
    slicing: SemanticSlicing,
    paths: Sequence[Path],
    console: Console,
    accuracy: ClassAccuracy | None = None,
) -> None:
    """Prints what restructuring did, and where the files are."""
    console.print(widths_table(result))
    sites: dict[str, list[str]] = {}
    for site, reason in result.report.kept_whole.items():
        sites.setdefault(reason, []).append(site)
    for reason, names in sites.items():
        console.print(f"kept whole: {', '.join(names)}: {reason}", highlight=False)
    if result.report.refits:
        console.print(refits_table(result))
    console.print(components_table(slicing, result.kept))
    console.print(restructured_table(result, accuracy))
    console.print(
        f"pruned equals masked within {result.report.difference:.1e} of the output's scale",
        highlight=False,
    )
    for path in paths:
        console.print(f"wrote [bold]{path}[/]", highlight=False)


def _add_classes(table: Table, accuracy: ClassAccuracy) -> None:
    present = accuracy.samples.nonzero().flatten().tolist()
    change = accuracy.change().tolist()
    listed = sorted(sorted(present, key=lambda k: change[k])[:_LISTED])
    for k in listed:
        samples = int(accuracy.samples[k])
        before, after = int(accuracy.before[k]) / samples, int(accuracy.after[k]) / samples
        table.add_row(f"  {accuracy.class_names[k]}", f"{before:.1%}", f"{after:.1%}", "")
    if (more := len(present) - len(listed)) > 0:
        table.add_row(f"  {more} more lose less", "", "", "")


def _costs(before: Cost, after: Cost) -> list[tuple[str, float, float, Any]]:
    """What is compared, before and after, and how it is written."""
    latencies = [
        (f"latency, batch of {size}", before.latency[size], after.latency[size], _milliseconds)
        for size in before.latency
    ]
    return [
        ("parameters", before.parameters, after.parameters, _count),
        ("multiply-adds", before.macs, after.macs, _count),
        *latencies,
        ("memory of the model", before.model_bytes, after.model_bytes, _size),
        ("activations of a sample", before.activation_bytes, after.activation_bytes, _size),
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:,.2f} ms"


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:,.0f} B" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"
