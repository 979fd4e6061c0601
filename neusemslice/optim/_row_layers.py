"""Layers whose weight is frozen but for some rows, which are leaves of their own.

``apply_layer`` gives the layer's output and, to autograd, a backward pass that knows of the tuned
rows only: the weight's other rows have no gradient that could be computed or stored. A kind of
layer says how it is applied, how its input's gradient is found, and how that of some rows. A second
derivative takes another way, torch's own on a weight put together from rows, because the gradients
found here are no functions of the leaves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from neusemslice import ops
from neusemslice.optim._row_norms import FrozenStatistics, Tunable, apply_norm


class Kind(ABC):
    """A layer with the options of one call, which adds its bias to what the weight gives.

    Attributes:
        neuron_dim: of the weight.
        output_dim: the dimension of the output that the neurons lie in.
        autocast: whether autocast would round the layer's arguments.
    """

    neuron_dim: int
    output_dim: int
    autocast: bool

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output, by differentiable operations."""

    @abstractmethod
    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor: ...

    @abstractmethod
    def row_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        """Of the weight, with the number of rows along ``neuron_dim``."""

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        bias_rows: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the weight's rows and of the bias's, where they are given."""
        return (
            None if rows is None else self.row_gradient(grad, x, weight, rows),
            None if bias_rows is None else ops.rows_bias_backward(grad, bias_rows, self.output_dim),
        )


@dataclass(frozen=True)
class LinearKind(Kind):
    """``x @ weight.T`` where the neurons are rows of the weight, ``x @ weight`` else.

    Attributes:
        together: whether the tuned rows of weight and bias are the same.
    """

    neuron_dim: int
    together: bool = False
    output_dim: int = -1
    autocast: bool = True

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight if self.neuron_dim == 0 else weight.t(), bias)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad @ (weight if self.neuron_dim == 0 else weight.t())

    def row_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        found = ops.rows_linear_backward(grad, x, rows)
        return found if self.neuron_dim == 0 else found.t()

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        bias_rows: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        few = rows is not None and bias_rows is not None and len(rows) < grad.shape[-1]
        if self.together and rows is not None and few:
            # Both read the same columns: they are gathered once, on a CPU by all threads, which
            # index_select is not.
            grad = grad.gather(-1, rows.expand(*grad.shape[:-1], -1))
            rows = bias_rows = torch.arange(len(rows), device=rows.device)
        return super().gradients(grad, x, weight, rows, bias_rows)


@dataclass(frozen=True)
class ConvKind(Kind):
    """A convolution of any number of dimensions; its input is batched and its padding numbers."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    neuron_dim: int = 0
    output_dim: int = 1
    autocast: bool = True

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        where = (self.stride, self.padding, self.dilation)
        return torch.convolution(
            x, weight, bias, *where, False, [0] * len(self.stride), self.groups
        )

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        where = (self.stride, self.padding, self.dilation, False, [0] * len(self.stride))
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *where, self.groups, [True, False, False]
        )
        return cast("Tensor", found[0])

    def row_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        if len(rows) > weight.shape[0] * (1 / 3 if x.element_size() == 2 else 1 / 2):
            # The library's whole gradient is then faster than that of so many rows.
            where = (self.stride, self.padding, self.dilation, False, [0] * len(self.stride))
            found = torch.ops.aten.convolution_backward(
                grad, x, weight, None, *where, self.groups, [False, True, False]
            )
            return cast("Tensor", found[1]).index_select(0, rows)
        kernel = (weight.shape[2:], self.stride, self.padding, self.dilation, self.groups)
        return ops.rows_conv_backward(grad, x, rows, *kernel)


@dataclass(frozen=True)
class TransposedConvKind(Kind):
    """A transposed convolution, whose weight is ``[I, O / groups, ...]``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    neuron_dim: int = 1
    output_dim: int = 1
    autocast: bool = True

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        where = (self.stride, self.padding, self.dilation)
        return torch.convolution(x, weight, bias, *where, True, self.output_padding, self.groups)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        where = (self.stride, self.padding, self.dilation, False, self.output_padding)
        return torch.convolution(grad, weight, None, *where, self.groups)

    def row_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        # It is the gradient of the convolution that reads the output's tuned channels: of every
        # group the same ones.
        spatial = grad.shape[2:]
        grouped = grad.unflatten(1, (self.groups, weight.shape[1]))
        read = grouped.index_select(2, rows).flatten(1, 2)
        like = weight.new_empty(()).expand(weight.shape[0], len(rows), *weight.shape[2:])
        where = (self.stride, self.padding, self.dilation, False, [0] * len(spatial))
        found = torch.ops.aten.convolution_backward(
            x, read, like, None, *where, self.groups, [False, True, False]
        )
        return cast("Tensor", found[1])


@dataclass(frozen=True)
class EmbeddingKind(Kind):
    """A table of rows that integers choose from; the neurons are its rows, or its features."""

    neuron_dim: int
    padding_idx: int
    scale_grad_by_freq: bool
    output_dim: int = -1
    autocast: bool = False

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = None if self.padding_idx < 0 else self.padding_idx
        return F.embedding(x, weight, padding, scale_grad_by_freq=self.scale_grad_by_freq)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError("integers have no gradient")

    def row_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        count = len(rows)
        if self.neuron_dim == 1:
            chosen = grad.index_select(-1, rows)
            number, skipped, where = weight.shape[0], self.padding_idx, x
        else:
            # Where each integer lies among the rows; those that are no row go to a place behind
            # them that is skipped.
            place = torch.searchsorted(rows, x.long()).clamp_max(count - 1)
            missing = (rows[place] != x) | (x == self.padding_idx)
            chosen, number, skipped, where = (
                grad,
                count + 1,
                count,
                place.masked_fill(missing, count),
            )
        found = torch.ops.aten.embedding_dense_backward(
            chosen, where, number, skipped, self.scale_grad_by_freq
        )
        return cast("Tensor", found if self.neuron_dim == 1 else found[:count])


class _TunedRows(torch.autograd.Function):
    """A layer's output as a function of its input and the leaves; weight and bias are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: Kind,
        x: Tensor,
        tuned: Tensor | None,
        tuned_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        bias_rows: Tensor | None,
    ) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(x, tuned, tuned_bias, weight, bias, rows, bias_rows)
        return kind.apply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, tuned, tuned_bias, weight, bias, rows, bias_rows = ctx.saved_tensors
        kind: Kind = ctx.kind
        wanted = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            found = _differentiable(
                kind, grad, x, tuned, tuned_bias, weight, bias, rows, bias_rows, wanted
            )
            return (None, *found, *[None] * 4)
        of_x = kind.input_gradient(grad, x, weight) if wanted[0] else None
        of_rows, of_bias = kind.gradients(
            grad, x, weight, rows if wanted[1] else None, bias_rows if wanted[2] else None
        )
        return (
            None,
            of_x,
            None if of_rows is None else of_rows.to(tuned.dtype),
            None if of_bias is None else of_bias.to(tuned_bias.dtype),
            *[None] * 4,
        )


def _differentiable(
    kind: Kind,
    grad: Tensor,
    x: Tensor,
    tuned: Tensor | None,
    tuned_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    bias_rows: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of input and leaves as functions of them, which autograd can go through."""
    # Aliases, because the input may itself be a function of the leaves: by way of the same layer
    # earlier on, for instance. What is wanted here are the derivatives of this one use.
    aliases = [t if t is None else t.view_as(t) for t in (x, tuned, tuned_bias)]
    own, own_rows, own_bias = aliases
    assert own is not None
    whole, whole_bias = weight, bias
    if own_rows is not None:
        assert rows is not None
        whole = weight.index_copy(kind.neuron_dim, rows, own_rows.to(weight.dtype))
    if own_bias is not None:
        assert bias is not None
        assert bias_rows is not None
        whole_bias = bias.index_copy(0, bias_rows, own_bias.to(bias.dtype))
    inputs = [t for t, needed in zip(aliases, wanted, strict=True) if needed and t is not None]
    output = kind.apply(own, whole, whole_bias)
    found = iter(torch.autograd.grad(output, inputs, grad, create_graph=True))
    return [next(found) if needed else None for needed in wanted]


def has_kind(module: nn.Module, neuron_dims: dict[str, int]) -> bool:
    """Whether ``kind_of`` knows the module with these tuned parameters and their neuron dimensions.

    A class of the user's own with a forward pass of its own is not known, whatever it derives from.
    """
    cls = type(module)
    own = {"weight", "bias"} if hasattr(module, "bias") else {"weight"}
    if not neuron_dims.keys() <= own <= module._parameters.keys():  # parametrized, for instance
        return False
    if neuron_dims.get("bias", 0) != 0:
        return False
    dim = neuron_dims.get("weight")
    if cls.forward is nn.Linear.forward:
        return dim in (None, 0)
    if cls.forward in _CONVOLUTIONS:
        return dim in (None, 0) and getattr(cls, "_conv_forward", None) in _CONV_FORWARDS
    if cls.forward in _TRANSPOSED:
        return dim in (None, 1)
    if cls.forward is nn.Embedding.forward:
        return True
    if cls.forward is _BatchNorm.forward:
        return not isinstance(module, nn.SyncBatchNorm)
    # transformers' linear layer whose weight is [inputs, outputs]; that library may be absent.
    is_turned = (cls.__module__, cls.__qualname__) == ("transformers.pytorch_utils", "Conv1D")
    return is_turned and dim in (None, 1)


_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_CONV_FORWARDS = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)
_TRANSPOSED = (
    nn.ConvTranspose1d.forward,
    nn.ConvTranspose2d.forward,
    nn.ConvTranspose3d.forward,
)


def kind_of(
    module: nn.Module, x: Tensor, neuron_dim: int, output_size: list[int] | None = None
) -> tuple[Kind | FrozenStatistics, Tensor] | None:
    """What a known module does with an input, and that input as the kind takes it.

    None for a call that only the module itself knows: of a convolution with one sample that has no
    dimension of samples, or of a batch norm with the batch's own statistics.
    """
    if isinstance(module, _ConvNd) and x.dim() != len(module.kernel_size) + 2:
        return None
    if isinstance(module, _BatchNorm):
        if module.training or module.running_mean is None or module.running_var is None:
            return None
        return FrozenStatistics(module.running_mean, module.running_var, module.eps), x
    if isinstance(module, _ConvTransposeNd):
        stride, padding = list(module.stride), [int(p) for p in module.padding]
        kernel, dilation = list(module.kernel_size), list(module.dilation)
        extra = module._output_padding(
            x, output_size, stride, padding, kernel, len(kernel), dilation
        )
        return TransposedConvKind(
            tuple(stride), tuple(padding), tuple(extra), tuple(dilation), module.groups
        ), x
    if isinstance(module, _ConvNd):
        around = module.padding
        if module.padding_mode != "zeros" or isinstance(around, str):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode)
            around = (0,) * len(module.kernel_size)
        strides, dilations = tuple(module.stride), tuple(module.dilation)
        return ConvKind(strides, tuple(around), dilations, module.groups), x
    if isinstance(module, nn.Embedding):
        padding_idx = -1 if module.padding_idx is None else module.padding_idx
        return EmbeddingKind(neuron_dim, padding_idx, module.scale_grad_by_freq), x
    return LinearKind(0 if isinstance(module, nn.Linear) else 1), x


def apply_layer(
    kind: Kind | FrozenStatistics, x: Tensor, weight: Tunable, bias: Tunable | None
) -> Tensor:
    """The output of a layer, differentiable in its input ``x`` and in the leaves."""
    if isinstance(kind, FrozenStatistics):
        return apply_norm(kind, x, weight, bias)
    own, own_bias = weight.constant, None if bias is None else bias.constant
    device = x.device.type
    if kind.autocast and torch.is_autocast_enabled(device):
        # What autocast does to the arguments of a layer; what is saved for the backward pass is
        # then of that dtype as well.
        dtype = torch.get_autocast_dtype(device)
        x, own = _cast(x, dtype), _cast(own, dtype)
        own_bias = None if own_bias is None else _cast(own_bias, dtype)
    leaf, rows = (None, None) if bias is None else (bias.leaf, bias.rows)
    if isinstance(kind, LinearKind) and rows is not None and rows is weight.rows:
        kind = replace(kind, together=True)
    output: Tensor = _TunedRows.apply(  # type: ignore[no-untyped-call]
        kind, x, weight.leaf, leaf, own, own_bias, weight.rows, rows
    )
    return output


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
