"""Operations that have the rules of their parts: norms, attention, gates.

Each is written with torch's own functions and run with these caught. The value is the operation's
up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neusemslice.profiling.calls import Call
from neusemslice.profiling.paired import Paired, Rule
from neusemslice.profiling.rules import linear


class NoRuleError(Exception):
    """Why an operation that is made of others cannot be."""


def made_of(parts: Callable[..., Tensor]) -> Rule:
    """The rule of an operation that is written as a function of others."""

    def rule(mode: Paired, call: Call) -> Tensor:
        try:
            with mode:
                return parts(*call.args, **call.kwargs)
        except NoRuleError as error:
            raise mode.refusal(call, str(error)) from None

    return rule


def _normalised(x: Tensor, dims: list[int], eps: float, *, centred: bool = True) -> Tensor:
    if centred:
        x = x - x.mean(dims, keepdim=True)
    return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    return _affine(_normalised(input, dims, eps), weight, bias)


def rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(_normalised(input, dims, eps, centred=False), weight, None)


def group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    grouped = input.reshape(input.shape[0], num_groups, -1)
    x = _normalised(grouped, [-1], eps).reshape(input.shape)
    shape = [1, -1, *[1] * (input.ndim - 2)]
    return _affine(x, *(None if p is None else p.view(shape) for p in (weight, bias)))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p > 0:
        raise NoRuleError("it drops at random; use model.eval()")
    if enable_gqa:
        share = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(share, -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    masked = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # A token that sees none reads zeros.
        masked = ~attn_mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~(attn_mask | masked), -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    return (weights if masked is None else weights.masked_fill(masked, 0)) @ value


def glu(input: Tensor, dim: int = -1) -> Tensor:  # noqa: A002
    left, right = input.chunk(2, dim)
    return left * right.sigmoid()


def hardsigmoid(input: Tensor) -> Tensor:  # noqa: A002
    return (input + 3).clamp(0, 6) / 6


def hardswish(input: Tensor) -> Tensor:  # noqa: A002
    return input * hardsigmoid(input)


def std(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
    return input.var(*args, **kwargs).sqrt()


def vector_norm(
    x: Tensor,
    ord: float = 2,  # noqa: A002
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    if ord not in (1, 2) or dim is None:
        raise NoRuleError(f"there is no rule for order {ord} over dimensions {dim}")
    if ord == 1:
        return x.abs().sum(dim, keepdim)
    return x.square().sum(dim, keepdim).sqrt()


def instance_norm(mode: Paired, call: Call) -> Any:
    x, weight, bias, _, _, from_input, _, eps = call.args[:8]
    if not from_input:
        return linear(mode, call)
    with mode:
        return group_norm(x, x.shape[1], weight, bias, eps)
