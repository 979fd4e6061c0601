"""The device that benchmarks run on, and how time is taken on a GPU.

A call is captured as a CUDA graph, and events before and after a replay give its time, so that
neither Python nor launches count. What stands in the L2 cache is read over before each replay;
read and not written, because lines that wait to be written back would slow down what comes next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

ENOUGH = 0.02
"""Seconds that the replays of one measurement fill, where they are many."""
LONG = 0.3
"""Seconds from which on a call is not repeated within one measurement."""

Run = Callable[[int], object]


class Gpu(Protocol):
    """What the timing needs of a GPU."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Runs outside of any capture, and waits."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """What runs it again."""

    def time(self, runs: list[Callable[[], object]]) -> list[float]:
        """Seconds on the device of each run, each with a cold cache."""


class TorchGpu:
    """The current GPU."""

    def __init__(self) -> None:
        self._flush: Tensor | None = None
        self._pool: tuple[int, int] | None = None

    def warm_up(self, run: Callable[[], object]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        # Graphs run one after the other and nobody keeps what they give: one pool is enough.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay

    def time(self, runs: list[Callable[[], object]]) -> list[float]:
        if self._flush is None:
            self._flush = torch.ones(cache_bytes(), device=DEVICE)
        events = []
        for run in runs:
            self._flush.sum()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]


class Replays:
    """Times a call by replays of a graph of it.

    Args:
        run: takes the number of the call, by which it picks its buffers.
        captured: False for what waits for the device, which no graph can hold; it is then called
            between the events, and its time is that of its launches, if those take longer.
        buffers: how many calls in a row pick buffers of their own.
    """

    def __init__(
        self, run: Run, *, captured: bool = True, buffers: int = 3, gpu: Gpu | None = None
    ) -> None:
        self._gpu = gpu or GPU
        self._calls: list[Callable[[], object]] = []
        for call in range(buffers):
            self._gpu.warm_up(lambda call=call: run(call))
            self._calls.append(
                self._gpu.capture(lambda call=call: run(call))
                if captured
                else lambda call=call: run(call)
            )

    def seconds(self, start: int = 0) -> float:
        """Median time of a call, of 5 to 51 replays; of one, where it takes long."""
        first = self._gpu.time([self._calls[start % len(self._calls)]])
        if first[0] > LONG:
            return first[0]
        more = min(50, max(4, int(ENOUGH / max(first[0], 1e-9))))
        calls = [self._calls[(start + i) % len(self._calls)] for i in range(more)]
        return statistics.median(self._gpu.time(calls))


GPU = TorchGpu()


def cache_bytes() -> int:
    """Of the GPU's last-level cache."""
    return int(torch.cuda.get_device_properties(DEVICE).L2_cache_size)


def use_device() -> None:
    """Has tensors and models made on the GPU from now on, where there is one."""
    if ON_GPU:
        torch.set_default_device(DEVICE)


def wall_seconds(run: Callable[[], object]) -> float:
    """Of one call, with what it leaves the device to do."""
    if ON_GPU:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def architecture() -> str:
    """Of the GPU, as the compiler names it: ``sm_90``."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Puts into the list it gives by how many MiB the block raised the GPU's memory at most."""
    found: list[float] = []
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    found.append((torch.cuda.max_memory_allocated() - before) / 2**20)
