"""Batch norms with frozen statistics, of whose weight and bias some rows may be tuned.

Such a norm multiplies each channel by a number and adds another, so its way back is a product and
asks for no input, and a tuned weight's gradient asks for that channel's input alone. torch's own
keeps the whole input, and adds up the gradients of all channels even when nobody wants them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neusemslice import ops


@dataclass(frozen=True)
class FrozenStatistics:
    """What a batch norm in evaluation mode normalises with: ``[C]`` each."""

    mean: Tensor
    var: Tensor
    eps: float

    def scale(self) -> Tensor:
        """One over the standard deviation."""
        return torch.rsqrt(self.var + self.eps)


@dataclass(frozen=True)
class Tunable:
    """A layer's weight or bias, of which some rows may be trained.

    Attributes:
        constant: the whole of it; its tuned rows hold the leaf's values.
        leaf: those rows, along its neuron dimension; ``None`` where nothing is tuned.
        rows: int64 ``[R]``.
    """

    constant: Tensor
    leaf: Tensor | None = None
    rows: Tensor | None = None


def apply_norm(
    statistics: FrozenStatistics, x: Tensor, weight: Tunable, bias: Tunable | None
) -> Tensor:
    """As ``apply_layer``, of a batch norm: ``x`` is ``[N, C, ...]``."""
    kept = None
    if weight.rows is not None:
        # Channels that lie side by side are not worth gathering.
        kept = x.index_select(1, weight.rows) if x.is_contiguous() else x
    own, leaf, rows = (None,) * 3 if bias is None else (bias.constant, bias.leaf, bias.rows)
    output: Tensor = _Norm.apply(  # type: ignore[no-untyped-call]
        statistics, x, kept, weight.leaf, leaf, weight.constant, own, weight.rows, rows
    )
    return output


class _Norm(torch.autograd.Function):
    """The output as a function of the input and the leaves; weight and bias are constants.

    ``kept`` is what the weight's gradient is found from, the input or its tuned channels: a
    function of the input, so that a second derivative finds its way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        statistics: FrozenStatistics,
        x: Tensor,
        kept: Tensor | None,
        tuned: Tensor | None,
        tuned_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        bias_rows: Tensor | None,
    ) -> Tensor:
        mean, var, eps = statistics.mean, statistics.var, statistics.eps
        ctx.eps, ctx.whole = eps, kept is not None and kept.shape == x.shape
        ctx.together = rows is not None and rows is bias_rows
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in (tuned, tuned_bias)]
        ctx.save_for_backward(kept, tuned, weight, mean, var, rows, bias_rows)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, tuned, weight, mean, var, rows, bias_rows = ctx.saved_tensors
        _, of_x, _, of_tuned, of_bias, *_ = ctx.needs_input_grad
        given = _Given(
            grad,
            None if kept is None else kept.to(grad.dtype),
            ctx.whole,
            FrozenStatistics(mean, var, ctx.eps),
            rows if of_tuned else None,
            bias_rows if of_bias else None,
            ctx.together and of_tuned and of_bias,
        )
        if torch.is_grad_enabled():
            found = given.differentiable_sums()
            if tuned is not None:
                weight = weight.index_copy(0, rows, tuned.to(weight.dtype))
        else:
            found = given.sums()
        of_leaves = (
            None if own is None else own.to(dtype)
            for own, dtype in zip(found, ctx.dtypes, strict=True)
        )
        scale = weight * given.statistics.scale()
        return None, _scaled(grad, scale) if of_x else None, None, *of_leaves, *[None] * 4


@dataclass(frozen=True)
class _Given:
    """What the gradients of tuned rows of weight and bias are found from.

    Attributes:
        kept: the input, or its tuned channels; None where no weight is tuned.
        whole: whether it is the input.
        rows, bias_rows: those whose gradients are wanted.
        together: whether both are wanted, and are the same.
    """

    grad: Tensor
    kept: Tensor | None
    whole: bool
    statistics: FrozenStatistics
    rows: Tensor | None
    bias_rows: Tensor | None
    together: bool

    def sums(self) -> tuple[Tensor | None, Tensor | None]:
        """Both, by the operators."""
        grad, rows, bias_rows = self.grad, self.rows, self.bias_rows
        mean, var, eps = self.statistics.mean, self.statistics.var, self.statistics.eps
        if rows is not None and self.kept is not None and self.whole:
            some = rows[:0] if bias_rows is None else bias_rows
            own, of_bias = ops.rows_norm_backward(grad, self.kept, mean, var, eps, rows, some)
            return own, None if bias_rows is None else of_bias
        found = None
        if rows is not None and self.kept is not None:
            every = torch.arange(len(rows), device=rows.device)
            chosen = grad.index_select(1, rows)
            mean, var = mean.index_select(0, rows), var.index_select(0, rows)
            some = every if self.together else every[:0]
            found, of_bias = ops.rows_norm_backward(chosen, self.kept, mean, var, eps, every, some)
            if self.together:
                return found, of_bias
        return found, None if bias_rows is None else ops.rows_bias_backward(grad, bias_rows, 1)

    def differentiable_sums(self) -> tuple[Tensor | None, Tensor | None]:
        """The same, by torch's operators."""
        grad, rows, kept = self.grad, self.rows, self.kept
        others = [d for d in range(grad.dim()) if d != 1]
        of_bias = None
        if self.bias_rows is not None:
            of_bias = grad.index_select(1, self.bias_rows).sum(others)
        if rows is None or kept is None:
            return None, of_bias
        mean, scale = self.statistics.mean[rows], self.statistics.scale()[rows]
        kept = kept.index_select(1, rows) if self.whole else kept
        centered = kept - _along_channels(mean, kept)
        return (grad.index_select(1, rows) * centered).sum(others) * scale, of_bias


def _along_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 2))


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """Each channel's gradient times a number, in the gradient's dtype."""
    if grad.dtype in (torch.float16, torch.bfloat16):
        # A product would be one of float32 that is stored, and rounded afterwards.
        zeros = torch.zeros_like(scale)
        return F.batch_norm(grad, zeros, zeros + 1, scale, None, False, 0.0, 0.0)
    return (grad * _along_channels(scale, grad)).to(grad.dtype)
