"""Compensation: a restructured model's weights, fitted to what the whole model answers.

Layer after layer in the order of the forward pass, on the restructured model's own activations,
which are compensated up to there: with ``x`` what the layer reads (for a convolution, the window
that it looks at, padding included) and ``t`` what the same layer answers in the whole model, its
weight and bias become

    argmin over W, b of  mean |t - W x - b|² + λ |W - W₀|²

with ``W₀`` the weight as it was and λ = ``RIDGE`` times the features' mean variance: ridge
regression towards the old weight. Where the layer's answer is added to a residual stream, ``t``
includes what the stream has lost on its way, so that errors do not pile up along the blocks. A bias
that the layer has no room for goes into the running mean of the batch norm behind it; where there
is none either, the fit goes without. No label and no gradient is needed.

Removed neurons are so folded into those that are left, at the price of one run through both models,
up to the layer, for each layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neusemslice._progress import track
from neusemslice.graph import (
    Graph,
    Inputs,
    device_of,
    evaluation,
    layer_dim,
    weight_dims,
)
from neusemslice.maintain.capture import Seen, capture, real_tokens
from neusemslice.ops import Gram, gram_
from neusemslice.profiling import unlabelled
from neusemslice.slicing import Slice

RIDGE = 1e-3
"""Strength of the pull towards the old weight, relative to the features' mean variance."""

_AT_ONCE = 2**24
"""Elements of a convolution's windows that are laid out at once: 64 MB in float32."""

_SAME = 1e-6
"""Share of a layer's variance that may be missed before the layer is fitted."""


@dataclass(frozen=True)
class Refit:
    """How far a layer was off, and is: the share of its answer's variance that it misses."""

    before: float
    after: float


@torch.no_grad()
def compensate(
    model: nn.Module, small: nn.Module, kept: Slice, loader: Iterable[Any], caller: str
) -> dict[str, Refit]:
    """Fits the layers of ``small`` to the answers of ``model``, in place.

    Layers that answer as before, and those that share a weight, are called several times or are
    grouped, transposed or three-dimensional convolutions, stay as they are.

    Args:
        model: the whole one; it is left as it was.
        small: what is left of it without the neurons outside ``kept``; changed.
        kept: closed, of ``model``.
        loader: samples, with labels or without; gone through for each layer.
        caller: named in errors.

    Returns:
        Per layer that was fitted, in the order of the forward pass.

    Raises:
        ValueError: naming the layer, if the loader has fewer rows (samples times positions) than
            the layer has features, or its activations are not finite; for a loader that can be
            gone through only once.
        RuntimeError: naming the layer whose normal equations could not be solved.
    """
    check_repeatable(loader, caller)
    done: dict[str, Refit] = {}
    with evaluation(model), evaluation(small):
        names = fittable(small, kept.graph, loader, caller)
        for name in track(names, f"{caller}: compensating"):
            fitted = _fit(_Layer(model, small, kept, name), loader, caller)
            if fitted is not None:
                done[name] = fitted
    return done


class _Layer:
    """One layer in the whole and in the small model."""

    def __init__(self, model: nn.Module, small: nn.Module, kept: Slice, name: str) -> None:
        self.name = name
        self.model = model
        self.small = small
        self.module: Any = small.get_submodule(name)
        self.weight = self.module.get_parameter("weight")
        self.out_dim, self.in_dim = weight_dims(self.module)
        self.dim = layer_dim(self.module)
        whole = model.get_submodule(name).get_parameter("weight").shape[self.out_dim]
        self.outputs = _left(kept, f"{name}.weight", self.out_dim, whole).to(self.weight.device)

    def rows(self, inputs: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
        """Features ``[R, F]`` and what the layer should answer ``[R, O]``, a part at a time."""
        own = capture(self.small, self.name, inputs)
        whole = capture(self.model, self.name, inputs)
        target = self._answers(self._chosen(whole.output) + self._lost(own, whole))
        keep = real_tokens(inputs, own.input)
        if self.weight.ndim == 2:
            x = own.input.flatten(0, -2)
            yield (x, target) if keep is None else (x[keep], target[keep])
            return
        positions = target.shape[0] // len(own.input)
        features = self.weight[0].numel()
        some = max(1, _AT_ONCE // (positions * features))
        for first in range(0, len(own.input), some):
            x = self._windows(own.input[first : first + some])
            yield x, target[first * positions : first * positions + len(x)]

    def matrix(self) -> Tensor:
        """The weight as float64 ``[F, O]``."""
        return self.weight.double().movedim(self.out_dim, -1).reshape(-1, len(self.outputs))

    def norm(self, inputs: Inputs) -> Any | None:
        """The batch norm that takes up a bias, if one does."""
        return self._norm(capture(self.small, self.name, inputs))

    def _norm(self, seen: Seen) -> Any | None:
        norm: Any = None if seen.norm is None else self.small.get_submodule(seen.norm)
        return norm if norm is not None and norm.running_mean is not None else None

    def set(self, matrix: Tensor, bias: Tensor | None, norm: Any | None) -> None:
        """Writes a fit; ``bias`` is the layer's whole bias."""
        shape = self.weight.movedim(self.out_dim, -1).shape
        self.weight.copy_(matrix.reshape(shape).movedim(-1, self.out_dim))
        if bias is None:
            return
        if self.module.bias is not None:
            self.module.bias.copy_(bias)
        elif norm is not None:
            norm.running_mean.sub_(bias)

    def _chosen(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.outputs)

    def _answers(self, x: Tensor) -> Tensor:
        return x.movedim(self.dim, -1).flatten(0, -2)

    def _lost(self, own: Seen, whole: Seen) -> Tensor | float:
        """What the residual stream has lost, in units of the layer's answer."""
        if own.stream is None or whole.stream is None:
            return 0.0
        before = self._chosen(whole.stream)
        if before.shape != own.stream.shape:
            return 0.0
        lost = before - own.stream
        if own.norm is None:
            return lost
        norm = self._norm(own)
        if norm is None:
            return 0.0
        scale: Tensor
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        # A channel that the norm all but switches off cannot make up for anything.
        usable = scale.abs() > 1e-3 * scale.abs().max()
        factor = torch.where(usable, scale, 1).reciprocal() * usable
        return lost * factor.view(
            [-1 if d == self.dim % lost.ndim else 1 for d in range(lost.ndim)]
        )

    def _windows(self, x: Tensor) -> Tensor:
        """What a convolution looks at, for each position of its output: ``[R, F]``."""
        conv = self.module
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
        flat = x.ndim == 3
        one = (1,) if flat else ()
        windows = F.unfold(
            x.unsqueeze(2) if flat else x,
            (*one, *conv.kernel_size),
            (*one, *conv.dilation),
            stride=(*one, *conv.stride),
        )
        return windows.transpose(1, 2).flatten(0, 1)


def _fit(layer: _Layer, loader: Iterable[Any], caller: str) -> Refit | None:
    """Fits a layer; None if it answers as before."""
    device = device_of(layer.small)
    inputs: Inputs | None = None
    old = layer.matrix()
    features, outputs = old.shape
    gram = Gram.empty(features + outputs, layer.weight.device)
    for inputs in unlabelled(loader, caller):
        inputs = inputs.to(device)
        for x, target in layer.rows(inputs):
            if not len(x):
                continue
            wide = torch.promote_types(x.dtype, torch.float32)
            gram_(gram, torch.cat([x.to(wide), target.to(wide)], 1))
    rows = int(gram.count)
    if not bool(gram.products.isfinite().all()):
        raise ValueError(f"{caller}: layer {layer.name} sees activations that are not finite")
    assert inputs is not None
    bias = layer.module.bias
    norm = layer.norm(inputs) if bias is None else None
    # In place as far as it goes: of a wide layer each of these matrices is gigabytes.
    products, mean = gram.products.div_(rows), gram.mean
    if bias is None and norm is None:
        products.addr_(mean, mean)
        mean = torch.zeros_like(mean)
    xx, xt = products[:features, :features], products[:features, features:]
    variance = products.diagonal()[features:].sum()

    def missed(matrix: Tensor, offset: Tensor) -> float:
        error = variance - 2 * (matrix * xt).sum() + (matrix * (xx @ matrix)).sum()
        error = error + (mean[features:] - mean[:features] @ matrix - offset).square().sum()
        return float(error.clamp_min(0) / variance.clamp_min(torch.finfo(torch.float64).tiny))

    before = missed(old, torch.zeros_like(mean[features:]) if bias is None else bias.double())
    if before <= _SAME:
        return None
    if rows < features + 1:
        raise ValueError(
            f"{caller}: layer {layer.name} has {features} features, but the calibration gives "
            f"it {rows} rows (samples times positions); give more samples, or compensate=False"
        )
    penalty = RIDGE * xx.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    # The transpose of a symmetric matrix is itself, and lies as LAPACK wants it: no copy is made.
    factor = xx.clone(memory_format=torch.contiguous_format).mT
    factor.diagonal().add_(penalty)
    failed = torch.empty((), dtype=torch.int32, device=xx.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    if int(failed):
        raise RuntimeError(
            f"{caller}: the normal equations of layer {layer.name} could not be solved"
        )
    # Not by cholesky_solve, which copies the factor.
    half = torch.linalg.solve_triangular(factor, xt - xx @ old, upper=False)
    fitted = old + torch.linalg.solve_triangular(factor.mT, half, upper=True)
    offset = mean[features:] - mean[:features] @ fitted
    layer.set(fitted, None if bias is None and norm is None else offset, norm)
    return Refit(before, missed(fitted, offset))


def _left(kept: Slice, tensor: str, dim: int, size: int) -> Tensor:
    """Which indices of a dimension of a tensor are left without the neurons outside ``kept``."""
    left = torch.ones(size, dtype=torch.bool)
    for site in kept.graph.sites:
        gone = (~kept.mask(site.name)).nonzero().squeeze(1)
        for span in (*site.rows, *site.columns):
            if span.tensor == tensor and span.dim == dim:
                left[span.indices(gone)] = False
    return left.nonzero().squeeze(1)


def check_repeatable(loader: Iterable[Any], caller: str) -> None:
    """Refuses a calibration that can be gone through only once.

    Raises:
        ValueError: for an iterator.
    """
    if iter(loader) is loader:
        raise ValueError(
            f"{caller}: compensation goes through the calibration once for each layer, but an "
            "iterator is used up after one; give a list or a DataLoader, or do without compensation"
        )


def fittable(model: nn.Module, graph: Graph, loader: Iterable[Any], caller: str) -> list[str]:
    """Names of the layers of a model, whole or cut, that can be fitted.

    In the order of the forward pass, of which two samples are needed.
    """
    names = {model.get_submodule(layer.name): layer.name for layer in graph.layers}
    calls: Counter[str] = Counter()

    def note(module: nn.Module, args: Any) -> None:
        calls[names[module]] += 1

    handles = [module.register_forward_pre_hook(note) for module in names]
    try:
        next(unlabelled(loader, caller)).head(2).to(device_of(model)).run(model)
    finally:
        for handle in handles:
            handle.remove()
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return [
        name
        for name, count in calls.items()
        for module in [model.get_submodule(name)]
        if count == 1
        and (
            isinstance(module, plain) or (weight_dims(module) == (1, 0) and module.weight.ndim == 2)
        )
        and getattr(module, "groups", 1) == 1
        and "weight" in module._parameters
        and all(owners[id(p)] == 1 for p in module.parameters(recurse=False))
    ]
