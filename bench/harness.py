"""How the benchmarks measure.

A workload is timed in rounds of {reference, ours, each peer, reference}. The reference moves the
same bytes, with the same mix of reads and writes, as fast as memory allows. What is reported is
the median over rounds of the ratios within a round: a shared machine changes its speed by far more
from minute to minute than within one round.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench.device import DEVICE, ON_GPU, Replays, cache_bytes
from bench.report import Column, Ratio, Result
from neusemslice import _C

CACHE_BYTES = cache_bytes() if ON_GPU else 32 * 2**20
COLUMNS = (
    Column("ms", "ms", "number"),
    Column("gigabytes", "GB/s", "number"),
    Column("limit", "of limit", "share", in_summary=True),
    Column("vs_strongest", "× strongest", "times", in_summary=True),
    Column("vs_plain", "× plain", "times", in_summary=True),
    Column("vs_compile", "× compile", "times", in_summary=True),
    Column("strongest", "strongest", "text"),
)

Run = Callable[[int], object]


@dataclass
class Workload:
    """What is timed. Each callable takes the number of the call, by which it picks its buffers.

    Attributes:
        name: key of the result.
        bytes_read: per call.
        bytes_updated: per call, of state that is read and written.
        ours: the operator.
        peers: by the column that they belong to (without ``vs_``); the fastest of a column counts.
        check: raises unless ours is right.
    """

    name: str
    bytes_read: int
    bytes_updated: int
    ours: Run
    check: Callable[[], None]
    peers: dict[str, dict[str, Run]] = field(default_factory=dict)


class Reference:
    """Moves a workload's bytes at the speed of memory: on a GPU by a sum and an update in place."""

    def __init__(self, bytes_read: int, bytes_updated: int) -> None:
        dtype = torch.float32 if ON_GPU else torch.int64
        self.read, self.update = (
            [torch.ones(size // dtype.itemsize, dtype=dtype, device=DEVICE) for _ in range(count)]
            for size, count in ((bytes_read, rotation(bytes_read)), (bytes_updated, 1))
        )

    def __call__(self, call: int) -> object:
        read, update = self.read[call % len(self.read)], self.update[0]
        if ON_GPU:
            return read.sum(), update.add_(1)
        return _C.stream_memory(read, update)


def rotation(bytes_each: int) -> int:
    """How many buffers of a size hold more than eight times the last-level cache; at least 3."""
    return max(3, 8 * CACHE_BYTES // bytes_each + 1)


def seconds(run: Run, start: int, least: float = 0.04, most_calls: int = 12) -> float:
    """Shortest time of a call, of enough calls to fill `least` seconds.

    The shortest, because an operator waits for its slowest thread: another process on one core
    makes a call of 2 ms last a whole time slice.
    """
    times: list[float] = []
    while len(times) < 3 or (sum(times) < least and len(times) < most_calls):
        begin = time.perf_counter()
        run(start + len(times))
        times.append(time.perf_counter() - begin)
    return min(times)


def clock(run: Run, *, captured: bool = True, buffers: int = 3) -> Callable[[int], float]:
    """What times calls of ``run`` from a given number on, after a first one.

    On a GPU as graphs, one for each of the `buffers` that calls in a row pick; or if that cannot be
    captured, as it is.
    """
    if ON_GPU:
        return Replays(run, captured=captured, buffers=buffers).seconds
    run(0)
    return lambda start: seconds(run, start)


def wait_until_quiet(most: float) -> None:
    """Waits until other processes leave the processor alone, but not for ever; a GPU is ours."""
    if ON_GPU:
        return
    give_up = time.monotonic() + most
    while time.monotonic() < give_up:
        begin, busy = time.monotonic(), _busy_seconds()
        time.sleep(0.1)
        if _busy_seconds() - busy < 0.1 * (time.monotonic() - begin):
            return


def _busy_seconds() -> float:
    """Processor time that was used so far, by all processes; 0 where the system does not say."""
    source = Path("/proc/stat")
    if not source.exists():
        return 0.0
    user, nice, system, _, _, *rest = map(int, source.read_text().split("\n")[0].split()[1:])
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


def measure(workload: Workload, rounds: int, patience: float) -> Result:
    """Checks a workload, warms everything up, and times it.

    `patience` is how many seconds a round waits at most for other processes to leave.
    """
    workload.check()
    reference = clock(Reference(workload.bytes_read, workload.bytes_updated))
    ours = clock(workload.ours)
    peers = [
        (kind, name, clock(run)) for kind, of in workload.peers.items() for name, run in of.items()
    ]
    shares, own = [], []
    slower: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind, name, _ in peers}
    for i in range(rounds):
        start = 7 * i
        wait_until_quiet(patience)
        before = reference(start)
        mine = ours(start)
        for kind, name, peer in peers:
            slower[kind, name].append(peer(start) / mine)
        after = reference(start + 1)
        shares.append((before + after) / 2 / mine)
        own.append(mine)
    typical = statistics.median(own)
    moved = workload.bytes_read + 2 * workload.bytes_updated
    result = Result(
        workload.name,
        {
            "ms": typical * 1e3,
            "gigabytes": moved / typical / 1e9,
            "limit": Ratio.of(shares),
        },
    )
    for kind, of in workload.peers.items():
        fastest = min(of, key=lambda name, kind=kind: statistics.median(slower[kind, name]))
        result.values[f"vs_{kind}"] = Ratio.of(slower[kind, fastest])
        if kind == "strongest":
            result.values["strongest"] = fastest
    return result


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, tensor in a.items():
        if not torch.equal(tensor, b[name]):
            raise AssertionError(f"a second run gave other bits in {name}")
