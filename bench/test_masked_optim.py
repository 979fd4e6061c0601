"""Small sizes of the masked optimizers for pytest-benchmark: ``python -m pytest bench``."""

import pytest
import torch
from torch import nn

from bench.masked_optim import KINDS

# Shape, and the neuron dimension.
LAYERS = {
    "rows": ((512, 512), 0),
    "columns": ((512, 512), 1),
    "kernels": ((64, 64, 3, 3), 0),
    "vector": ((4096,), 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_masked_optim(benchmark, kind, layer, dtype, share):
    shape, dim = LAYERS[layer]
    p = nn.Parameter(torch.randn(shape).to(dtype))
    p.grad = torch.randn_like(p)
    rows = torch.randperm(shape[dim])[: round(share * shape[dim])].sort().values
    group = {"params": [p], "rows": [rows], "neuron_dims": [dim]}
    benchmark(KINDS[kind].masked([group], **KINDS[kind].options).step)
