"""What restructuring would do, as a table in a terminal."""

from __future__ import annotations

from rich.table import Table

from neusemslice.maintain import Plan

_SHARES = (0.7, 0.5, 0.3)
"""Shares of the neurons that the sensitivity of a group is shown at."""


def plan_table(planned: Plan) -> Table:
    """Per coupled group its neurons, what goes with them, and how sensitive it is."""
    table = Table(title="Restructuring would keep")
    table.add_column("sites")
    headings = ("neurons", "kept", "contribution lost", "parameters", "multiply-adds")
    for heading in (*headings, *(f"lost at {share:.0%} kept" for share in _SHARES)):
        table.add_column(heading, justify="right")
    for group in planned.groups:
        name, *others = group.sites
        table.add_row(
            name + f" and {len(others)} more" * bool(others),
            f"{group.before:,}",
            f"{group.after:,}" if not group.kept_whole else "all",
            f"{group.lost:.1%}",
            f"−{group.parameters:,}",
            f"−{group.macs:,}",
            *(f"{float(group.losses[round(s * group.before)]):.0%}" for s in _SHARES),
        )
    before, after = (sum(getattr(g, at) for g in planned.groups) for at in ("before", "after"))
    table.add_section()
    table.add_row(
        "all", f"{before:,}", f"{after:,}", "", _change(planned.parameters), _change(planned.macs)
    )
    return table


def _change(cost: tuple[int, int]) -> str:
    return f"{cost[1]:,} = {cost[1] / max(1, cost[0]):.1%}"
