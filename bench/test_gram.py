"""Small sizes of gram_ for pytest-benchmark: ``python -m pytest bench``."""

import pytest
import torch

from neusemslice import ops
from neusemslice.ops import Gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1024, 256), (8192, 145)], ids=str)
def test_gram(benchmark, shape, dtype):
    x = torch.randn(shape).to(dtype)
    benchmark(ops.gram_, Gram.empty(shape[1]), x)
