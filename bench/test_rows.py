"""Small sizes of the gradients of tuned rows for pytest-benchmark: ``python -m pytest bench``."""

import pytest
import torch

from bench.rows import Layer
from neusemslice import ops

LAYERS = {
    "linear": Layer(512, 256, 512),
    "conv": Layer(8, 32, 32, 28),
    "grouped": Layer(8, 32, 32, 28, 8),
    "depthwise": Layer(8, 64, 64, 28, 64),
}


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_weight_gradient(benchmark, kind, dtype, share):
    layer = LAYERS[kind]
    grad, x = (t.to(dtype) for t in layer.tensors())
    rows = torch.randperm(layer.outputs)[: round(share * layer.outputs)].sort().values
    benchmark(layer.ours, grad, x, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_gradient(benchmark, dtype):
    grad, rows = torch.randn(32, 64, 28, 28).to(dtype), torch.arange(0, 64, 4)
    benchmark(ops.rows_bias_backward, grad, rows, 1)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_norm_gradients(benchmark, form):
    grad, x = (torch.randn(32, 64, 28, 28).contiguous(memory_format=form) for _ in range(2))
    mean, rows = torch.zeros(64), torch.arange(0, 64, 4)
    benchmark(ops.rows_norm_backward, grad, x, mean, mean + 1, 1e-5, rows, rows)
