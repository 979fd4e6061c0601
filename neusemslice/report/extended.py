"""What extension did, as tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from neusemslice.maintain import Capacity, Extended, TaskAccuracy


def extended_table(result: Extended, accuracies: Mapping[str, TaskAccuracy]) -> Table:
    """Accuracy of each task, where it was measured, and what learning the new one took."""
    report = result.report
    table = _table("Extended", "", "task given", "task inferred", "task found")
    for name, task in result.model.tasks.items():
        found = accuracies.get(name)
        label = f"{name}: {len([k for k in task.classes if k >= 0])} classes"
        if found is None:
            table.add_row(label, "", "", "")
        else:
            shares = (found.given, found.inferred, found.chosen)
            table.add_row(f"{label}, {found.samples:,} samples", *(f"{s:.1%}" for s in shares))
    table.add_section()
    rows = [
        ("old answers bit-identical", "yes" if report.unchanged else "no"),
        ("neurons trained", f"{report.free_neurons:.1%}"),
        ("parameters trained", f"{report.trained_parameters:,}"),
        ("optimizer state", f"{report.training.optimizer_bytes:,} B"),
        ("steps", f"{report.training.steps:,}"),
        ("steps per second", f"{report.training.steps_per_second:.1f}"),
    ]
    if report.consolidation is not None:
        rows.append(("layers compensated", f"{len(report.consolidation.refits)}"))
        rows.append(("steps of consolidation", f"{report.consolidation.training.steps:,}"))
    for name, value in rows:
        table.add_row(name, value, "", "")
    return table


def left_table(result: Extended) -> Table:
    """How many neurons are free for further tasks, site by site."""
    table = _table("Free for further tasks", "site", "neurons", "free")
    for site, (neurons, free) in result.report.left.items():
        table.add_row(site, f"{neurons:,}", f"{free:,}")
    return table


def capacity_table(found: Capacity) -> Table:
    """How many neurons are free and how many a new task is expected to need, site by site."""
    table = _table("Capacity", "site", "neurons", "free", "expected")
    for site in found.sites:
        table.add_row(site.site, f"{site.neurons:,}", f"{site.free:,}", f"{site.expected:,}")
    return table


def print_extended(
    result: Extended,
    accuracies: Mapping[str, TaskAccuracy],
    capacity: Capacity | None,
    paths: Sequence[Path],
    console: Console,
) -> None:
    """Prints what extension met, what it did, and where the files are."""
    if capacity is not None:
        console.print(capacity_table(capacity))
        console.print(str(capacity), highlight=False)
        for number, share in capacity.reuse.items():
            console.print(f"class {number} is expected to reuse {share:.0%}", highlight=False)
    console.print(extended_table(result, accuracies))
    console.print(left_table(result))
    for path in paths:
        console.print(f"wrote [bold]{path}[/]", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table
