"""What re-adaptation did, as a table in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from neusemslice.maintain import Readapted, Score

_LISTED_COMPONENTS = 10
"""Of more tuned components a table shows those that moved farthest."""


def readapted_table(result: Readapted) -> Table:
    """Accuracies before and after, what was tuned, and what it took."""
    report = result.report
    table = Table(title="Re-adapted")
    for i, column in enumerate(("", "before", "after")):
        table.add_column(column, justify="left" if i == 0 else "right")
    for name, before, after in (
        ("new", report.new_before, report.new_after),
        ("old", report.old_before, report.old_after),
    ):
        if before is not None and after is not None:
            label = f"accuracy on {before.samples:,} {name} samples"
            table.add_row(label, _percent(before), _percent(after))
    table.add_section()
    rows = (
        ("neurons tuned", f"{len(result.tuned):,} = {report.tuned_neurons:.1%}"),
        ("parameters tuned", f"{report.tuned_parameters:,}"),
        ("optimizer state", f"{report.training.optimizer_bytes:,} B"),
        ("delta", f"{result.delta.nbytes:,} B"),
        ("steps", f"{report.training.steps:,}"),
        ("steps per second", f"{report.training.steps_per_second:.1f}"),
        ("epochs", f"{len(report.training.losses)}, kept that of {report.best_epoch}"),
    )
    for name, value in rows:
        table.add_row(name, "", value)
    table.add_section()
    for component in report.components[:_LISTED_COMPONENTS]:
        table.add_row(f"component {component}", "", f"drift {report.drift[component]:.2f}")
    if (more := len(report.components) - _LISTED_COMPONENTS) > 0:
        table.add_row(f"{more} more", "", "")
    return table


def print_readapted(result: Readapted, paths: Sequence[Path], console: Console) -> None:
    """Prints what re-adaptation did, and where the files are."""
    console.print(readapted_table(result))
    for path in paths:
        console.print(f"wrote [bold]{path}[/]", highlight=False)


def _percent(found: Score) -> str:
    return f"{found.accuracy:.1%}"
