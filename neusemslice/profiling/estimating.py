"""What a sweep over a loader will take, from a few of its batches."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from neusemslice.profiling.sweep import profile

_TRIED = 2
"""Batches that are timed, behind a first one that warms up."""


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a sweep.

    Attributes:
        batches: that the loader has.
        seconds: that the whole sweep will take.
        state_bytes: that its statistics take in memory, however many samples there are.
    """

    batches: int
    seconds: float
    state_bytes: int

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        return (
            f"{self.batches:,} batches take about {minutes} min {seconds:02d} s, and their "
            f"statistics {self.state_bytes / 2**20:,.1f} MiB."
        )


def estimate(
    model: nn.Module, loader: Any, metrics: Sequence[str] = ("avg", "taylor"), **options: Any
) -> Estimate:
    """Estimates what ``profile`` will take, by profiling the loader's first batches.

    What every sweep takes before its first batch is measured apart, and counted once.

    Args:
        model, metrics, options: as for ``profile``; a checkpoint is neither read nor written.
        loader: as for ``profile``, with a length; it is begun once and not gone through.

    Raises:
        TypeError: for a loader that does not know its length.
        ValueError: for one without batches, and as ``profile``.
    """
    if not hasattr(loader, "__len__"):
        raise TypeError(f"estimate: the loader must have a length, got {type(loader).__name__}")
    options.pop("checkpoint", None)
    first = list(itertools.islice(iter(loader), 1 + _TRIED))
    if not first:
        raise ValueError("estimate: the loader has no batch")

    def timed(batches: Iterable[Any]) -> tuple[float, int]:
        begin = time.perf_counter()
        with warnings.catch_warnings():
            # That of values which are not finite comes again with the sweep itself.
            warnings.simplefilter("ignore", RuntimeWarning)
            found = profile(model, batches, metrics, **options)
        size = sum(tensor.nbytes for tensor in found.state_dict().values())
        return time.perf_counter() - begin, size

    alone = min(timed(first[:1])[0] for _ in range(2))
    several, size = timed(first)
    each = max(0.0, several - alone) / max(1, len(first) - 1)
    return Estimate(len(loader), alone + (len(loader) - 1) * each, size)
