"""The demo's outcome as one table in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from neusemslice.report.outcome import Outcome


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Prints what each maintenance task measured before and after."""
    table = Table(title="What maintenance did, on held-out images")
    table.add_column("measured")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("share", justify="right")
    for section in (_restructure(outcome), _readapt(outcome), _extend(outcome)):
        table.add_section()
        heading, *rows = section
        table.add_row(f"[bold]{heading[0]}[/]")
        for row in rows:
            table.add_row(f"  {row[0]}", *row[1:])
    console.print(table)


def _restructure(o: Outcome) -> list[tuple[str, ...]]:
    before, after = o.cost_before, o.cost_after
    return [
        ("restructure: half the multiply-adds",),
        (
            f"accuracy, {o.fine_tuning_epochs} epoch(s) on",
            _percent(o.trained),
            _percent(o.restructured),
        ),
        (
            "parameters",
            f"{before.parameters:,}",
            f"{after.parameters:,}",
            _share(after.parameters, before.parameters),
        ),
        ("multiply-adds", f"{before.macs:,}", f"{after.macs:,}", _share(after.macs, before.macs)),
        (
            "latency of 64 images",
            f"{before.latency[64] * 1e3:.2f} ms",
            f"{after.latency[64] * 1e3:.2f} ms",
            _share(after.latency[64], before.latency[64]),
        ),
    ]


def _readapt(o: Outcome) -> list[tuple[str, ...]]:
    return [
        ("re-adapt: rotated, blurred digits",),
        ("accuracy", _percent(o.shifted_before), _percent(o.shifted_after), f"{o.regained:.0%}"),
        ("  of full fine-tuning", _percent(o.shifted_before), _percent(o.shifted_full), "100%"),
        ("accuracy, plain digits", _percent(o.trained), _percent(o.kept_after)),
        ("neurons tuned", "", "", f"{o.tuned_neurons:.0%}"),
        (
            "optimizer state, to full tuning",
            f"{o.full_bytes:,} B",
            f"{o.tuned_bytes:,} B",
            _share(o.tuned_bytes, o.full_bytes),
        ),
        ("all else bit-identical", "", _yes(o.untuned_identical)),
    ]


def _extend(o: Outcome) -> list[tuple[str, ...]]:
    return [
        ("extend: digits 5-9 after 0-4",),
        ("accuracy, old, under the mask", _percent(o.old_original), _percent(o.old_masked)),
        ("accuracy, new", "", _percent(o.new)),
        ("neurons trained", "", "", f"{o.free_neurons:.0%}"),
        ("old outputs bit-identical", "", _yes(o.old_identical)),
    ]


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}"


def _yes(value: bool) -> str:
    return "[green]yes[/]" if value else "[red]no[/]"
