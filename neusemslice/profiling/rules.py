"""Multipliers of torch's operations: how an output's difference divides among the inputs'.

For each operation ``Δout = Σ multiplier · Δin`` holds exactly, where Δ is the difference between
sample and baseline. With ``x̄`` for the mean of the two:

==================  ==============================================================================
linear              the derivative
elementwise         ``Δf / Δx``; where the two are so close that rounding would show, ``f'(x̄)``
quadratic           the derivative at the mean, which is exact: ``Δ(xy) = x̄ Δy + ȳ Δx``, likewise
                    matmul, variance and attention's products
quotient            ``Δ(x / y) = (Δx - z̄ Δy) / ȳ`` with ``z = x / y``, from the product ``x = z y``
softmax             ``p = exp(log p)``: ``Δp = L Δlog p`` with the logarithmic mean L of the two
                    probabilities; as those sum to 1 on both sides, ``Δlogsumexp = Σ L Δx / Σ L``
maximum             all of ``Δmax`` goes to where the larger of the two maxima is (SHAP's rule for
                    DeepLIFT: Lundberg and Lee, 2017; Captum's as well), with a factor in [0, 1]
norms, attention    made of these (compositions.py)
==================  ==============================================================================

A composition has the same multiplier as its parts, so ``gelu(x)`` and ``x * cdf(x)`` agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neusemslice.profiling.calls import Call, attach, baseline_of, link_of
from neusemslice.profiling.paired import Paired, Rule

linear = Paired.both
"""The derivative is the multiplier: autograd records the function itself."""


def _attached(
    mode: Paired,
    call: Call,
    standin: Tensor,
    value: Tensor,
    baseline: Tensor,
    m: Tensor | None = None,
) -> Tensor:
    linked = mode.link(call, attach(standin, value, m), baseline)
    assert isinstance(linked, Tensor)
    return linked


# Elementwise.


def _one(mode: Paired, call: Call) -> Tensor:
    if len(call.paired) != 1:
        raise mode.refusal(call, "there is no rule for it with several activations")
    return call.paired[0]


def _slope(call: Call, x: Tensor, at: Tensor) -> Tensor:
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        out = call.run(lambda tensor: at if tensor is x else tensor.detach())
        if not out.requires_grad:
            return torch.zeros_like(at)
        slope: Tensor = torch.autograd.grad(out.sum(), at)[0]
        return slope


def _elementwise(mode: Paired, call: Call, *, exact: bool) -> Tensor:
    x = _one(mode, call)
    value, baseline = call.values()
    a, b = x.detach(), baseline_of(x)
    delta = a - b
    close = a == b
    if not exact:
        # A quotient is off by eps / |Δ|, relative to the values, and the derivative at the mean by
        # Δ²: at sqrt(eps) the quotient keeps half of its digits, and the derivative all.
        eps = torch.finfo(a.dtype).eps
        close |= delta.abs() <= math.sqrt(eps) * torch.maximum(a.abs(), b.abs())
    # Where it is infinite the two are equal, and there is no difference to multiply.
    slope = _slope(call, x, (a + b) / 2).nan_to_num(0, 0, 0)
    standin = x
    if value.shape != x.shape:
        with torch.enable_grad():
            standin = x.expand(value.shape)
        delta, close = delta.expand(value.shape), close.expand(value.shape)
        if slope.shape != value.shape:
            raise mode.refusal(call, "there is no rule for it with a constant of a larger shape")
    m = torch.where(close, slope, (value - baseline).div_(delta))
    return _attached(mode, call, standin, value, baseline, m)


def smooth(mode: Paired, call: Call) -> Tensor:
    """``Δf / Δx`` of a function whose values are rounded."""
    return _elementwise(mode, call, exact=False)


def kinked(mode: Paired, call: Call) -> Tensor:
    """``Δf / Δx`` of a function of straight pieces, whose values are not rounded."""
    return _elementwise(mode, call, exact=True)


def _closed(form: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Rule:
    """``Δf / Δx`` in closed form, of sample, baseline and the function's two values."""

    def rule(mode: Paired, call: Call) -> Tensor:
        x = _one(mode, call)
        value, baseline = call.values()
        with torch.no_grad():
            m = form(x.detach(), baseline_of(x), value, baseline)
        return _attached(mode, call, x, value, baseline, m)

    return rule


def _ratio(t: Tensor) -> Tensor:
    """``(1 - exp(-t)) / t`` for ``t >= 0``; 1 for NaN, the difference of equal infinities."""
    return torch.where(t > 0, -torch.expm1(-t) / t, 1.0)


def _exp(a: Tensor, b: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.maximum(y, z) * _ratio((a - b).abs())


def _sqrt(a: Tensor, b: Tensor, y: Tensor, z: Tensor) -> Tensor:
    # Where both are 0 there is no difference to divide.
    return torch.where(y + z > 0, 1 / (y + z), 0.0)


def _rsqrt(a: Tensor, b: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return -((y * z) ** 2) / (y + z)


def _reciprocal(a: Tensor, b: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return -y * z


def _relu(a: Tensor, b: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.where(a == b, (a > 0).to(a.dtype), (y - z).div_(a - b))


CLOSED: dict[str, Rule] = {
    "relu": _closed(_relu),
    "exp": _closed(_exp),
    "sqrt": _closed(_sqrt),
    "rsqrt": _closed(_rsqrt),
    "reciprocal": _closed(_reciprocal),
}
"""Functions whose ``Δf / Δx`` can be had without a quotient of small differences."""


def power(mode: Paired, call: Call) -> Any:
    """A power with a constant exponent, or of a constant base."""
    exponent = call.args[1] if len(call.args) > 1 else call.kwargs.get("exponent")
    if not isinstance(exponent, Tensor) and exponent == 2:
        return quadratic(mode, call)
    return smooth(mode, call)


# Products and quotients.


def quadratic(mode: Paired, call: Call) -> Any:
    """A function of degree two: the derivative at the mean of sample and baseline."""
    value, baseline = call.values()
    means = {id(x): attach(x, (x.detach() + baseline_of(x)) / 2) for x in call.paired}
    with torch.enable_grad():
        standin = call.run(lambda tensor: means.get(id(tensor), tensor))
    if isinstance(standin, Tensor):
        return _attached(mode, call, standin, value, baseline)
    return tuple(
        _attached(mode, call, *three) for three in zip(standin, value, baseline, strict=True)
    )


def product(mode: Paired, call: Call) -> Any:
    """A product: linear where only one factor depends on the input."""
    factors = sum(
        link_of(item) is not None
        for value in (*call.args, *call.kwargs.values())
        for item in (value if isinstance(value, (tuple, list)) else [value])
        if isinstance(item, Tensor)
    )
    if factors == 1:
        return linear(mode, call)
    if call.name == "einsum" and factors > 2:
        raise mode.refusal(call, f"there is no rule for a product of {factors} activations")
    return quadratic(mode, call)


def quotient(mode: Paired, call: Call) -> Any:
    """``x / y``."""
    x, y = (*call.args, *(call.kwargs.get(name) for name in ("other",)))[:2]
    if call.kwargs.get("rounding_mode") is not None:
        raise mode.refusal(call, "there is no rule for it with a rounding mode")
    if not isinstance(y, Tensor) or link_of(y) is None:
        return linear(mode, call)
    value, baseline = call.values()
    with torch.no_grad():
        below, other = y.detach(), baseline_of(y)
        mean = (below + other) / 2
        # Between denominators of different signs the mean may be 0; there the rule is that of
        # the product of x and 1 / y.
        alike = below * other > 0
        mean = mean.masked_fill(~alike, 1)
        of_x = torch.where(alike, 1 / mean, (1 / below + 1 / other) / 2)
        above = x
        if isinstance(x, Tensor):
            above = (x.detach() + baseline_of(x)) / 2
        of_y = -torch.where(alike, (value + baseline) / 2 / mean, above / (below * other))
    with torch.enable_grad():
        standin = y * of_y
        if isinstance(x, Tensor) and link_of(x) is not None:
            standin = x * of_x + standin
    return _attached(mode, call, standin, value, baseline)


# Softmax.


def softmax(mode: Paired, call: Call) -> Tensor:
    """``softmax``, ``log_softmax`` and ``logsumexp``."""
    x = _one(mode, call)
    dim = call.args[1] if len(call.args) > 1 else call.kwargs["dim"]
    keep = call.args[2] if len(call.args) > 2 else call.kwargs.get("keepdim", False)
    value, baseline = call.values()
    with torch.no_grad():
        dtype = value.dtype
        mean = _logarithmic_mean(
            _log_probabilities(x.detach().to(dtype), dim),
            _log_probabilities(baseline_of(x).to(dtype), dim),
        )
        total = mean.sum(dim, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    with torch.enable_grad():
        wide = x.to(dtype)
        if call.name == "logsumexp":
            standin = (wide * (mean / total)).sum(dim, keepdim=bool(keep))
        else:
            standin = wide - (wide * (mean / total)).sum(dim, keepdim=True)
            if call.name == "softmax":
                standin = standin * mean
    return _attached(mode, call, standin, value, baseline)


def _log_probabilities(x: Tensor, dim: Any) -> Tensor:
    # Rows that are masked altogether have no probabilities.
    return (x - x.logsumexp(dim, keepdim=True)).nan_to_num(nan=-torch.inf)


def _logarithmic_mean(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``(p - q) / (log p - log q)``; 0 if either is."""
    larger = torch.maximum(log_p, log_q)
    distance = (log_p - log_q).abs().nan_to_num(nan=torch.inf)
    return larger.exp() * _ratio(distance)


# Maxima.


def _chosen(
    mode: Paired,
    call: Call,
    x: Tensor,
    dim: int,
    i: Tensor,
    j: Tensor,
    value: Tensor,
    other: Tensor,
) -> Tensor:
    """Of maxima along ``dim`` that are at ``i`` in the sample and at ``j`` in the baseline."""
    with torch.enable_grad():
        standin = x.gather(dim, torch.where(value >= other, i, j))
    with torch.no_grad():
        taken = torch.where(value >= other, i, j)
        here, there = x.detach().gather(dim, taken), baseline_of(x).gather(dim, taken)
        m = torch.where(here == there, (i == j).to(value.dtype), (value - other).div_(here - there))
    return _attached(mode, call, standin, value, other, m)


def max_pool(pool: Callable[..., Any], dims: int, *, indices: bool) -> Rule:
    def rule(mode: Paired, call: Call) -> Any:
        x = _one(mode, call)
        args, kwargs = call.args[1:], call.kwargs
        with torch.no_grad():
            value, i = pool(x.detach(), *args, **kwargs, return_indices=True)
            other, j = pool(baseline_of(x), *args, **kwargs, return_indices=True)
        with torch.enable_grad():
            pixels = x.flatten(-dims)
        mode.link(call, pixels, baseline_of(x).flatten(-dims))
        flat = (t.flatten(-dims) for t in (i, j, value, other))
        chosen = _chosen(mode, call, pixels, -1, *flat)
        with torch.enable_grad():
            pooled = mode.link(call, chosen.view(value.shape), other)
        found = f"{call.name} in {mode.where}"
        return (pooled, mode.link(call, i, j, found)) if indices else pooled

    return rule


def maximum(mode: Paired, call: Call) -> Any:
    """The largest along dimensions, or the larger of two."""
    x, rest = call.args[0], call.args[1:]
    with_indices = call.name in ("max", "min")
    other = rest[0] if rest else call.kwargs.get("other")
    if isinstance(other, Tensor):
        if len(call.paired) == 1:
            return kinked(mode, call)
        with mode:
            both = torch.stack(torch.broadcast_tensors(x, other))
            return both.amin(0) if call.name in ("min", "minimum") else both.amax(0)
    dim = rest[0] if rest else call.kwargs.get("dim", ())
    keep = rest[1] if len(rest) > 1 else call.kwargs.get("keepdim", False)
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    if not dims:
        raise mode.refusal(call, "there is no rule for it over all dimensions, samples included")
    if call.name in ("min", "amin"):
        with mode:
            found = (-x).amax(dims, keep).neg()
            return torch.return_types.min((found, x.argmin(dim, keep))) if with_indices else found
    with mode:
        at = [d % x.ndim for d in dims]
        flat = x.movedim(at, list(range(-len(at), 0))).flatten(-len(at))
    with torch.no_grad():
        value, i = flat.detach().max(-1, keepdim=True)
        less, j = baseline_of(flat).max(-1, keepdim=True)
    chosen = _chosen(mode, call, flat, -1, i, j, value, less)
    with mode:
        found = chosen.squeeze(-1)
        for d in sorted(at) if keep else ():
            found = found.unsqueeze(d)
        return torch.return_types.max((found, x.argmax(dim, keep))) if with_indices else found


# What depends on the model's mode, and what would leave autograd's graph.


def batch_norm(mode: Paired, call: Call) -> Any:
    """Linear, if it does not take its statistics from the batch."""
    if call.args[5]:
        raise mode.refusal(call, "its statistics are the batch's; use model.eval()")
    return linear(mode, call)


def dropout(mode: Paired, call: Call) -> Any:
    """The identity, if nothing is dropped."""
    p, training = (*call.args[1:], *call.kwargs.values())[:2]
    if training and p > 0:
        raise mode.refusal(call, "it drops at random; use model.eval()")
    return call.args[0]


def kept(mode: Paired, call: Call) -> Any:
    """What would leave autograd's graph stays in it: the difference goes on."""
    with mode:
        return call.args[0].view_as(call.args[0])
