"""Weight gradients of tuned rows only (contract: ``csrc/ops/rows.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neusemslice.ops._fake import check_one_device, register_fake


def rows_linear_backward(grad: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Gradient of some rows of a linear layer's weight.

    Sums are in float32 (float64 for float64), on the CPU with the same bits each time and at any
    number of threads; on CUDA, torch's TF32 settings apply. It is differentiable in ``grad`` and
    ``x``, any number of times.

    Args:
        grad: the gradient of the layer's output, floating point ``[..., O]``.
        x: the layer's input ``[..., I]``, of the same dtype.
        rows: int64 ``[R]``, rising, in ``[0, O)``.

    Returns:
        ``[R, I]``: at ``[r, i]`` the sum of ``grad[..., rows[r]] * x[..., i]``.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device, or (on the CPU) wrong rows.
    """
    found: Tensor = torch.ops.neusemslice.rows_linear_backward(grad, x, rows)
    return found


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
    """Gradient of some rows of a convolution's weight.

    Sums are as in ``rows_linear_backward``, and so are the errors and derivatives.

    Args:
        grad: the gradient of the convolution's output, floating point ``[N, O, ...]`` with one to
            three spatial dimensions.
        x: the convolution's input ``[N, I, ...]``, of the same dtype.
        rows: int64 ``[R]``, rising, in ``[0, O)``.
        kernel_size, stride, padding, dilation: one entry per spatial dimension; padding is zeros.
        groups: as of the convolution.

    Returns:
        ``[R, I / groups, *kernel_size]``.
    """
    found: Tensor = torch.ops.neusemslice.rows_conv_backward(
        grad, x, rows, kernel_size, stride, padding, dilation, groups
    )
    return found


def rows_bias_backward(grad: Tensor, rows: Tensor, neuron_dim: int) -> Tensor:
    """Gradient of some elements of a bias: the sums of ``grad`` over all other dimensions.

    Sums are as in ``rows_linear_backward``, and so are the errors and derivatives.

    Args:
        grad: the gradient of the layer's output, floating point.
        rows: int64 ``[R]``, rising, in ``[0, O)``.
        neuron_dim: the dimension of ``grad`` of size ``O``.

    Returns:
        ``[R]``.
    """
    found: Tensor = torch.ops.neusemslice.rows_bias_backward(grad, rows, neuron_dim)
    return found


def rows_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    rows: Tensor,
    bias_rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of some elements of a batch norm's weight and bias, its statistics being given.

    Sums are as in ``rows_linear_backward``, and so are the errors and derivatives, which are in
    ``grad`` and ``x``. All channels are read, which costs less than gathering those of the rows.

    Args:
        grad: the gradient of the norm's output, floating point ``[N, C, ...]``.
        x: the norm's input, of the same shape and dtype.
        mean: of each channel, floating point ``[C]``.
        var: variance of each channel, of the same shape and dtype.
        eps: what the norm adds to the variance.
        rows: of the weight, int64 ``[R]``, rising, in ``[0, C)``.
        bias_rows: of the bias, int64 ``[R']``, likewise.

    Returns:
        ``[R]`` and ``[R']``, of the dtype of ``mean``: with ``c = rows[r]`` the sum of
        ``grad[:, c] * (x[:, c] - mean[c]) / sqrt(var[c] + eps)``, and with ``c = bias_rows[r]`` the
        sum of ``grad[:, c]``.
    """
    found: tuple[Tensor, Tensor] = torch.ops.neusemslice.rows_norm_backward(
        grad, x, mean, var, eps, rows, bias_rows
    )
    return found


# Shapes are checked by the kernels; these say what comes out of right ones.


@register_fake("rows_linear_backward")
def _rows_linear_fake(grad: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    check_one_device("rows_linear_backward", grad, x, rows)
    return grad.new_empty(rows.shape[0], x.shape[-1])


@register_fake("rows_conv_backward")
def _rows_conv_fake(
    grad: Tensor, x: Tensor, rows: Tensor, kernel_size: list[int], *others: Any
) -> Tensor:
    check_one_device("rows_conv_backward", grad, x, rows)
    return grad.new_empty(rows.shape[0], x.shape[1] // others[-1], *kernel_size)


@register_fake("rows_bias_backward")
def _rows_bias_fake(grad: Tensor, rows: Tensor, neuron_dim: int) -> Tensor:
    check_one_device("rows_bias_backward", grad, rows)
    return grad.new_empty(rows.shape[0])


@register_fake("rows_norm_backward")
def _rows_norm_fake(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    rows: Tensor,
    bias_rows: Tensor,
) -> tuple[Tensor, Tensor]:
    check_one_device("rows_norm_backward", grad, x, mean, var, rows, bias_rows)
    return mean.new_empty(rows.shape[0]), mean.new_empty(bias_rows.shape[0])


# Derivatives. A gradient of rows is linear in grad and in x, so with the incoming `of` placed into
# a weight of zeros they are the layer itself and the gradient of its input. These are made of
# torch's own operators, and differentiable in turn.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.options = inputs[len(tensors) :]


def _rows_linear_derivative(ctx: Any, of: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, rows = ctx.saved_tensors
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        of_grad = torch.zeros_like(grad).index_copy(-1, rows, x @ of.t())
    if ctx.needs_input_grad[1]:
        of_x = grad.index_select(-1, rows) @ of
    return of_grad, of_x, None


def _rows_conv_derivative(ctx: Any, of: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, rows = ctx.saved_tensors
    _, stride, padding, dilation, groups = ctx.options
    none = [0] * len(stride)
    weight = of.new_zeros(grad.shape[1], *of.shape[1:]).index_copy(0, rows, of)
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        of_grad = torch.convolution(x, weight, None, stride, padding, dilation, False, none, groups)
    if ctx.needs_input_grad[1]:
        of_x = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            none,
            groups,
            [True, False, False],
        )[0]
    return of_grad, of_x, *[None] * 6


def _rows_bias_derivative(ctx: Any, of: Tensor) -> tuple[Tensor | None, ...]:
    grad, rows = ctx.saved_tensors
    (dim,) = ctx.options
    shape = [1] * grad.dim()
    shape[dim] = -1
    whole = of.new_zeros(grad.shape[dim]).index_copy(0, rows, of)
    return whole.view(shape).expand_as(grad), None, None


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, x, mean, var, ctx.eps, rows, bias_rows = inputs
    ctx.save_for_backward(grad, x, mean, var, rows, bias_rows)


def _rows_norm_derivative(ctx: Any, of: Tensor, of_bias: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, mean, var, rows, bias_rows = ctx.saved_tensors
    shape = (-1, *[1] * (x.dim() - 2))
    none = mean.new_zeros(x.shape[1])
    scale = (none.index_copy(0, rows, of) * torch.rsqrt(var + ctx.eps)).view(shape)
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        shift = none.index_copy(0, bias_rows, of_bias).view(shape)
        of_grad = ((x - mean.view(shape)) * scale + shift).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        of_x = (grad * scale).to(x.dtype)
    return of_grad, of_x, *[None] * 5


torch.library.register_autograd(
    "neusemslice::rows_norm_backward", _rows_norm_derivative, setup_context=_save_norm
)

for _name, _derivative in (
    ("rows_linear_backward", _rows_linear_derivative),
    ("rows_conv_backward", _rows_conv_derivative),
    ("rows_bias_backward", _rows_bias_derivative),
):
    torch.library.register_autograd(f"neusemslice::{_name}", _derivative, setup_context=_save)
