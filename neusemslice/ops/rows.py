"""Weight gradients of tuned rows only (contract: ``csrc/ops/rows.h``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_linear_backward(grad: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Gradient of some rows of a linear layer's weight."""
    return grad.index_select(-1, rows).flatten(0, -2).t() @ x.flatten(0, -2)


def rows_conv_backward(
    grad: Tensor,
    x: Tensor,
    rows: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of some rows of a convolution's weight."""
    weight = grad.new_empty(()).expand(grad.shape[1], x.shape[1] // groups, *kernel_size)
    found = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [False, True, False],
    )
    chosen: Tensor = found[1].index_select(0, rows)
    return chosen


def rows_bias_backward(grad: Tensor, rows: Tensor, neuron_dim: int) -> Tensor:
    """Gradient of some elements of a bias."""
    chosen = grad.index_select(neuron_dim, rows)
    others = [d for d in range(grad.dim()) if d != neuron_dim % grad.dim()]
    return chosen.sum(others)
