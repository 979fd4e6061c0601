"""Measuring: rounds in which ours, the peers and a bandwidth reference take turns.

Absolute times on a shared machine drift by several times, so every figure is a ratio within a
round, and the median over the rounds is reported.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

# Buffers take turns so that none is still in the last-level cache when its turn comes.
ROTATED_BYTES = 8 * 32 * 2**20


@dataclass(frozen=True)
class Measured:
    """One workload: median seconds of each way, and our ratios."""

    workload: str
    seconds: dict[str, float]
    ratios: dict[str, float]


def measure(
    workload: str,
    ours: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    moved_bytes: float,
    rounds: int,
) -> Measured:
    """Times ours and the peers in turns.

    ``limit`` is the share of the read bandwidth that ours reaches, by the bytes that it must move;
    ``vs_<peer>`` is the peer's time over ours.
    """
    reference = torch.ones(64 * 2**20)
    ways = {"reference": reference.sum, "ours": ours, **peers}
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    bandwidth = [reference.numel() * 4 / t for t in times["reference"]]
    ratios = {
        "limit": statistics.median(
            moved_bytes / b / t for b, t in zip(bandwidth, times["ours"], strict=True)
        )
    }
    for peer in peers:
        pairs = zip(times[peer], times["ours"], strict=True)
        ratios[f"vs_{peer}"] = statistics.median(theirs / mine for theirs, mine in pairs)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return Measured(workload, seconds, ratios)


def report(title: str, results: list[Measured]) -> None:
    """Prints a table, and as the last line one JSON object."""
    table = Table(title=title)
    table.add_column("workload")
    columns = list(dict.fromkeys(key for r in results for key in r.ratios))
    table.add_column("ours", justify="right")
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        cells = [
            f"{result.ratios[column]:.2f}" if column in result.ratios else "" for column in columns
        ]
        table.add_row(result.workload, f"{result.seconds['ours'] * 1e3:.2f} ms", *cells)
    Console().print(table)
    print(json.dumps({r.workload: {k: round(v, 4) for k, v in r.ratios.items()} for r in results}))
