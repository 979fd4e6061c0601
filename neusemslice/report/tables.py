"""A profile and a slicing as tables in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from neusemslice.profiling import Profile
from neusemslice.slicing import SemanticSlicing


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 1 else "right")
    return table


def print_profile(profile: Profile, path: Path, console: Console) -> None:
    """Prints what was observed, what was not and why, and where the file is."""
    graph = profile.graph
    table = _table("Observed", "site", "neurons", "active", "not finite")
    for site in graph.sites:
        stats = profile.activations[site.name]
        assert stats.active is not None
        weight = stats.positions / stats.positions.sum().clamp_min(1)
        active = float((weight.unsqueeze(1) * stats.active).sum(0).mean())
        table.add_row(
            site.name, f"{site.neurons:,}", f"{active:.0%}", f"{int(stats.nonfinite.sum()):,}"
        )
    console.print(table)
    for name, reason in graph.skipped.items():
        console.print(f"not observed: {name}: {reason}", highlight=False)
    counts = ", ".join(
        f"{name} {count:g}"
        for name, count in zip(profile.class_names, profile.samples.tolist(), strict=True)
    )
    console.print(f"samples per class: {counts}", highlight=False)
    console.print(f"wrote [bold]{path}[/]", highlight=False)


def print_slicing(slicing: SemanticSlicing, path: Path, console: Console) -> None:
    """Prints how many neurons are critical at each site, and how classes group."""
    profile = slicing.profile
    title = f"Critical at θ = {slicing.threshold:g} by {slicing.metric}"
    table = _table(title, "site", "neurons", "to any class", "to a class, mean")
    for site in profile.graph.sites:
        critical = slicing.critical[site.name]
        table.add_row(
            site.name,
            f"{site.neurons:,}",
            f"{int(critical.any(0).sum()):,}",
            f"{float(critical.sum(1).double().mean()):,.1f}",
        )
    kept = slicing.critical_slice()
    table.add_section()
    table.add_row("all", f"{profile.graph.neurons:,}", f"{len(kept):,}", "")
    console.print(table)
    groups: dict[int, list[str]] = {}
    for name, group in zip(profile.class_names, slicing.class_groups.tolist(), strict=True):
        groups.setdefault(group, []).append(name)
    listed = "; ".join(", ".join(names) for names in groups.values())
    console.print(f"{slicing.num_components} semantic components; class groups: {listed}")
    console.print(f"wrote [bold]{path}[/]", highlight=False)
