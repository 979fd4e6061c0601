"""Progress on a terminal: what, how far, how fast, how long still."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

_T = TypeVar("_T")


def length(items: Iterable[object]) -> int | None:
    """How many items there are, if they know."""
    try:
        return len(items) if isinstance(items, Sized) else None
    except TypeError:  # a DataLoader over an iterable data set has __len__, but no length
        return None


def track(items: Iterable[_T], what: str, total: int | None = None) -> Iterator[_T]:
    """Yields the items, with a bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    if total is None:
        total = length(items)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield from progress.track(items, total=total, description=what)
