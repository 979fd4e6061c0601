"""The demo's outcome as one table in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from neusemslice.report.outcome import Outcome


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Prints what each maintenance task measured before and after."""
    before, after = outcome.cost_before, outcome.cost_after
    table = Table(title="What maintenance did, on held-out images")
    table.add_column("task")
    table.add_column("measured")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("")
    epochs = f"after {outcome.fine_tuning_epochs} epochs of fine-tuning"
    rows = (
        (
            "restructure",
            "accuracy",
            f"{outcome.trained:.1%}",
            f"{outcome.restructured:.1%}",
            epochs,
        ),
        (
            "",
            "parameters",
            f"{before.parameters:,}",
            f"{after.parameters:,}",
            _share(after.parameters, before.parameters),
        ),
        (
            "",
            "multiply-adds",
            f"{before.macs:,}",
            f"{after.macs:,}",
            _share(after.macs, before.macs),
        ),
        (
            "",
            "latency, batch of 64",
            f"{before.latency * 1e3:.2f} ms",
            f"{after.latency * 1e3:.2f} ms",
            _share(after.latency, before.latency),
        ),
        None,
        (
            "re-adapt",
            "accuracy, shifted digits",
            f"{outcome.shifted_before:.1%}",
            f"{outcome.shifted_after:.1%}",
            f"{outcome.regained:.0%} of what full fine-tuning regains ({outcome.shifted_full:.1%})",
        ),
        ("", "accuracy, first digits", f"{outcome.trained:.1%}", f"{outcome.kept_after:.1%}", ""),
        ("", "neurons tuned", "100%", f"{outcome.tuned_neurons:.0%}", ""),
        (
            "",
            "optimizer state",
            f"{outcome.full_bytes:,} B",
            f"{outcome.tuned_bytes:,} B",
            _share(outcome.tuned_bytes, outcome.full_bytes),
        ),
        ("", "other weights bit-identical", "", _yes(outcome.untuned_identical), ""),
        None,
        (
            "extend",
            "accuracy, old digits",
            f"{outcome.old_original:.1%}",
            f"{outcome.old_masked:.1%}",
            "under the old slice",
        ),
        ("", "accuracy, new digits", "-", f"{outcome.new:.1%}", ""),
        ("", "neurons trained", "-", f"{outcome.free_neurons:.0%}", ""),
        ("", "old outputs bit-identical", "", _yes(outcome.old_identical), ""),
    )
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    console.print(table)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}"


def _yes(value: bool) -> str:
    return "[green]yes[/]" if value else "[red]no[/]"
