"""Small sizes of class_stats_ for pytest-benchmark: ``python -m pytest bench --benchmark-only``."""

import pytest
import torch

from neusemslice import ops
from neusemslice.ops import ClassStats

SHAPES = {
    "rows": (512, 512),
    "planes": (32, 64, 14, 14),
    "channels_last": (32, 64, 14, 14),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", SHAPES)
def test_class_stats(benchmark, layout, dtype):
    x = torch.randn(SHAPES[layout]).to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    order = ops.class_order(torch.randint(0, 10, (x.shape[0],)), 10)
    state = ClassStats.empty(10, x.shape[1])
    benchmark(ops.class_stats_, state, x, order)


def test_class_order(benchmark):
    benchmark(ops.class_order, torch.randint(0, 100, (4096,)), 100)
