"""What restructuring would do, as a table in a terminal."""

from __future__ import annotations

from rich.table import Table

from neusemslice.maintain import Plan

_SHARES = (0.7, 0.5, 0.3)
"""Shares of the neurons that the sensitivity of a group is shown at."""


def plan_table(planned: Plan) -> Table:
    """Per coupled group its neurons, the share of its contribution that goes, and what that saves.

    “At” says what would go if the group kept those shares of its neurons: how sensitive it is. With
    calibration, what counts is by how much the answers would change.
    """
    table = Table(title="Restructuring would keep")
    table.add_column("sites")
    measured = any(group.changes is not None for group in planned.groups)
    shares = " / ".join(f"{share:.0%}" for share in _SHARES)
    sensitivity = f"answers change at {shares}" if measured else f"at {shares}"
    for heading in ("neurons", "kept", "lost", sensitivity, "parameters", "multiply-adds"):
        table.add_column(heading, justify="right")
    for group in planned.groups:
        name, *others = group.sites
        curve = group.losses if group.changes is None else group.changes
        losses = (float(curve[round(share * group.before)]) for share in _SHARES)
        table.add_row(
            name + f" and {len(others)} more" * bool(others),
            f"{group.before:,}",
            f"{group.after:,}" if not group.kept_whole else "all",
            f"{group.lost:.1%}",
            " / ".join(f"{lost:.0%}" for lost in losses),
            f"−{group.parameters:,}",
            f"−{group.macs:,}",
        )
    before, after = (sum(getattr(g, at) for g in planned.groups) for at in ("before", "after"))
    table.add_section()
    table.add_row(
        "all",
        f"{before:,}",
        f"{after:,}",
        "",
        "",
        _change(planned.parameters),
        _change(planned.macs),
    )
    return table


def _change(cost: tuple[int, int]) -> str:
    return f"{cost[1]:,} = {cost[1] / max(1, cost[0]):.1%}"
