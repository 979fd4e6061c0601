"""A profile and a slicing as tables in a terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from torch import Tensor

from neusemslice.profiling import Profile
from neusemslice.slicing import SemanticSlicing, Slice

if TYPE_CHECKING:
    from neusemslice.report.faithfulness import Faithfulness

_LISTED_CLASSES = 20
"""With more classes a table shows those that lose most, this many."""


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


def print_slice(kept: Slice, console: Console) -> None:
    """Prints how much of each site is in a slice."""
    table = _table(f"Slice {kept.digest[:8]}", "site", "neurons", "in the slice", "share")
    for row in kept.table():
        table.add_row(row.site, f"{row.neurons:,}", f"{row.kept:,}", f"{row.density:.0%}")
    table.add_section()
    table.add_row("all", f"{kept.graph.neurons:,}", f"{len(kept):,}", f"{kept.density:.0%}")
    console.print(table)


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


def faithfulness_table(found: Faithfulness) -> Table:
    """Accuracy of slices, random slices and complements: over all classes, then class by class."""
    title = f"Accuracy of slices by {found.metric}"
    table = _table(title, "", "neurons", "whole", "slice", "random, equal size", "complement")
    overall, kept, dropped = map(found.over_classes, (found.whole, found.kept, found.dropped))
    chance, deviation = found.chance()
    for t, threshold in enumerate(found.thresholds):
        table.add_section()
        table.add_row(
            f"[bold]θ = {threshold:.3g}[/]",
            f"{float(found.density[t]):.1%}",
            _percent(overall),
            _percent(kept[t]),
            _percent(chance[t], deviation[t]),
            _percent(dropped[t]),
        )
        present = [k for k, count in enumerate(found.samples.tolist()) if count]
        if len(present) > _LISTED_CLASSES:
            loss = (found.whole - found.kept[t]).tolist()
            present = sorted(sorted(present, key=lambda k: -loss[k])[:_LISTED_CLASSES])
        for k in present:
            draws = found.random[t, :, k]
            table.add_row(
                f"  {found.class_names[k]}",
                "",
                _percent(found.whole[k]),
                _percent(found.kept[t, k]),
                _percent(draws.mean(), draws.std() if len(draws) > 1 else draws.mean() * math.nan),
                _percent(found.dropped[t, k]),
            )
    return table


def _percent(value: Tensor, deviation: Tensor | None = None) -> str:
    text = f"{float(value):.1%}"
    if deviation is None or math.isnan(float(deviation)):
        return text
    return f"{text} ± {float(deviation):4.1%}"
