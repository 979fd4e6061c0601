"""class_stats_ against the ways to compute class statistics with torch's own operators.

``plain`` is what one writes first: index_add_ into fresh tensors and a scatter maximum.
``strongest`` is the same with every buffer allocated beforehand.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness import ROTATED_BYTES, Measured, measure, report
from neusemslice import ops
from neusemslice.ops import ClassStats

_STATE_BYTES = 28  # per class and neuron: mean and M2 in float64, three statistics in float32


def _plain(x: Tensor, labels: Tensor, num_classes: int) -> Callable[[], object]:
    def run() -> object:
        shape = (num_classes, x.shape[1])
        total = x.new_zeros(shape).index_add_(0, labels, x)
        squares = x.new_zeros(shape).index_add_(0, labels, x * x)
        magnitude = x.new_zeros(shape).index_add_(0, labels, x.abs())
        active = x.new_zeros(shape).index_add_(0, labels, (x > 0).to(x.dtype))
        index = labels[:, None].expand_as(x)
        largest = x.new_full(shape, -torch.inf).scatter_reduce_(0, index, x, "amax")
        return total, squares, magnitude, active, largest

    return run


def _strongest(x: Tensor, labels: Tensor, num_classes: int) -> Callable[[], object]:
    sums = torch.zeros(4, num_classes, x.shape[1], dtype=x.dtype)
    largest = torch.full_like(sums[0], -torch.inf)
    scratch = torch.empty_like(x)

    def run() -> object:
        sums[0].index_add_(0, labels, x)
        sums[1].index_add_(0, labels, torch.mul(x, x, out=scratch))
        sums[2].index_add_(0, labels, torch.abs(x, out=scratch))
        sums[3].index_add_(0, labels, torch.gt(x, 0, out=scratch))
        return largest.index_reduce_(0, labels, x, "amax")

    return run


def _check(x: Tensor, labels: Tensor, num_classes: int) -> None:
    """The result against float64 before anything is timed."""
    state = ClassStats.empty(num_classes, x.shape[1])
    ops.class_stats_(state, x, ops.class_order(labels, num_classes))
    count = torch.bincount(labels, minlength=num_classes).clamp_min(1).double()[:, None]
    mean = torch.zeros_like(state.mean).index_add_(0, labels, x.double()) / count
    deviation = (x.double() - mean[labels]).square()
    variance = torch.zeros_like(mean).index_add_(0, labels, deviation) / count
    torch.testing.assert_close(state.mean, mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state.variance(), variance, rtol=1e-9, atol=1e-12)


def _workload(
    samples: int, neurons: int, num_classes: int, dtype: torch.dtype, rounds: int
) -> Measured:
    copies = max(2, ROTATED_BYTES // (samples * neurons * dtype.itemsize))
    inputs = [torch.randn(samples, neurons).to(dtype) for _ in range(copies)]
    labels = torch.randint(0, num_classes, (samples,))
    _check(inputs[0], labels, num_classes)
    state = ClassStats.empty(num_classes, neurons)
    order = ops.class_order(labels, num_classes)
    turns = itertools.cycle(inputs)
    peers = {
        name: [way(x, labels, num_classes) for x in inputs[:2]]
        for name, way in (("strongest", _strongest), ("plain", _plain))
    }
    cycled = {name: itertools.cycle(ways) for name, ways in peers.items()}
    present = labels.unique().numel()
    moved = samples * neurons * dtype.itemsize + 2 * present * neurons * _STATE_BYTES + 8 * samples
    return measure(
        f"{str(dtype).removeprefix('torch.')} [{samples}, {neurons}] K={num_classes}",
        lambda: ops.class_stats_(state, next(turns), order),
        {name: (lambda ways=ways: next(ways)()) for name, ways in cycled.items()},
        moved,
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under a minute")
    rounds = 5 if parser.parse_args().quick else 15
    torch.manual_seed(0)
    results = [
        _workload(4096, 2048, num_classes, dtype, rounds)
        for dtype in (torch.float32, torch.bfloat16)
        for num_classes in (10, 100, 1000)
    ]
    report("class_stats_, five statistics", results)


if __name__ == "__main__":
    main()
