"""Small sizes of contribution_ for pytest-benchmark: ``python -m pytest bench``."""

import pytest
import torch

from neusemslice import ops
from neusemslice.ops import CONTRIBUTION_STATISTICS, ClassStats

SHAPES = {
    "rows": (512, 512),
    "planes": (32, 64, 14, 14),
    "channels_last": (32, 64, 14, 14),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", SHAPES)
def test_contribution(benchmark, layout, dtype):
    x, g = (torch.randn(SHAPES[layout]).to(dtype) for _ in range(2))
    if layout == "channels_last":
        x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    order = ops.class_order(torch.randint(0, 10, (x.shape[0],)), 10)
    state = ClassStats.empty(10, x.shape[1], CONTRIBUTION_STATISTICS)
    benchmark(ops.contribution_, state, x, g, order)
