"""What a GPU can do at most: copy and read bandwidth, and matrix products on random data.

python -m bench.limits            writes bench/results/

The last line is one JSON object: terabytes (TB/s) a copy moves, reads and writes counted, and a
reduction reads; and TFLOP/s of a product of 8192 × 8192 matrices.
"""

from __future__ import annotations

import json
import sys

import torch
from rich.console import Console

from bench.device import ON_GPU, Replays, use_device
from bench.report import Column, Result, Section

COLUMNS = (
    Column("ms", "ms", "number"),
    Column("terabytes", "TB/s", "number"),
    Column("teraflops", "TFLOP/s", "number"),
)
NOTE = "The other sections' limits were measured in their own runs. fp32: without TF32."
SIZE = 8192
BYTES = 2**31


def bandwidths() -> list[Result]:
    buffers = [torch.randn(BYTES // 4) for _ in range(4)]
    results = []
    for name, run, moved in (
        ("copy", lambda i: buffers[i % 2].copy_(buffers[2 + i % 2]), 2 * BYTES),
        ("read (sum)", lambda i: buffers[i % 4].sum(), BYTES),
    ):
        seconds = Replays(run, buffers=4).seconds()
        results.append(Result(name, {"ms": seconds * 1e3, "terabytes": moved / seconds / 1e12}))
    return results


def products() -> list[Result]:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        out = torch.empty(SIZE, SIZE, dtype=dtype)
        seconds = Replays(lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out), buffers=1).seconds()
        values = {"ms": seconds * 1e3, "teraflops": 2 * SIZE**3 / seconds / 1e12}
        results.append(Result(f"product, {str(dtype).removeprefix('torch.')}", values))
    return results


def main() -> int:
    if not ON_GPU:
        print("limits: no CUDA device; the benchmarks measure a processor's memory themselves")
        return 1
    use_device()
    section = Section("limits", "Limits", NOTE, COLUMNS, [*bandwidths(), *products()])
    section.show(Console(width=100))
    print(f"written: {section.write().name}")
    rates = {
        result.name: round(result.values[key], 3)
        for result in section.results
        for key in ("terabytes", "teraflops")
        if key in result.values
    }
    print(json.dumps(rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
