"""Layer-wise sparsity: how many of each layer's units stay, of a number that stays in all.

A unit is a weight, or a neuron with all its incoming weights; its magnitude ``|w|`` is then their
norm. Inside a layer the units of least magnitude go. How many, four published choices say:

==========  =====================================================================================
global      the units of least magnitude of all layers together
lamp        those of least ``w² / Σ v²`` over the units ``v`` of the layer that are not smaller than
            ``w``, itself included (Lee et al., Layer-adaptive Sparsity for the Magnitude-based
            Pruning, 2021)
uniform+    the same share of each layer, but all of the first, and at least a fifth of the last
            (Gale et al., The State of Sparsity in Deep Neural Networks, 2019)
erk         shares in proportion to ``(inputs + outputs + kernel height + kernel width) / (inputs ·
            outputs · kernel height · kernel width)``, at most 1 (Evci et al., Rigging the Lottery,
            2020)
==========  =====================================================================================

A layer keeps at least one unit, experts as many as each token has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Method = Literal["lamp", "global", "uniform+", "erk"]
METHODS: tuple[Method, ...] = get_args(Method)

LAST = 0.2
"""Share of the last layer's units that uniform+ keeps at least."""


@dataclass(frozen=True)
class Units:
    """The units of a layer.

    Attributes:
        squares: their magnitudes, squared; float64 ``[n]``.
        shape: of the layer's weight: outputs, inputs, and the kernel's sizes.
        first: whether the layer reads the model's input.
        last: whether it gives the model's answer; of neurons, whether that layer reads them.
        least: how many must stay.
    """

    squares: Tensor
    shape: tuple[int, ...]
    first: bool = False
    last: bool = False
    least: int = 1

    def __len__(self) -> int:
        return len(self.squares)


def counts(method: Method, layers: Sequence[Units], keep: int) -> list[int]:
    """How many units of each layer stay.

    Raises:
        ValueError: if ``keep`` is fewer than the method must keep, or more than there are.
    """
    total = sum(map(len, layers))
    least = fewest(method, layers)
    if not sum(least) <= keep <= total:
        raise ValueError(
            f"compress: {method} keeps {sum(least)} to {total} units of {len(layers)} layers, "
            f"got {keep}"
        )
    if method in ("uniform+", "erk"):
        rates = [1.0 if method == "uniform+" else _erk(units.shape) for units in layers]
        return _filled(rates, [len(units) for units in layers], least, keep)
    scores = [(_lamp if method == "lamp" else Tensor.clone)(units.squares) for units in layers]
    for own, units in zip(scores, layers, strict=True):
        own[strongest(own, units.least)] = torch.inf
    order = torch.cat(scores).sort(descending=True, stable=True).indices[:keep]
    bounds = torch.tensor([len(units) for units in layers]).cumsum(0)
    return torch.bincount(
        torch.bucketize(order.cpu(), bounds, right=True), minlength=len(layers)
    ).tolist()


def fewest(method: Method, layers: Sequence[Units]) -> list[int]:
    """How many units of each layer a method keeps at least."""
    if method != "uniform+":
        return [units.least for units in layers]
    return [
        len(units)
        if units.first
        else max(units.least, round(LAST * len(units)) if units.last else 1)
        for units in layers
    ]


def strongest(squares: Tensor, count: int) -> Tensor:
    """Which units are the ``count`` of greatest magnitude, ties by index; bool ``[n]``."""
    order = squares.sort(descending=True, stable=True).indices[:count]
    mask = torch.zeros(len(squares), dtype=torch.bool, device=squares.device)
    mask[order] = True
    return mask


def _lamp(squares: Tensor) -> Tensor:
    """LAMP's scores; of equal units the first counts as the greater."""
    ranked, order = squares.sort(descending=True, stable=True)
    tiny = torch.finfo(squares.dtype).tiny
    return torch.empty_like(squares).scatter(0, order, ranked / ranked.cumsum(0).clamp_min(tiny))


def _erk(shape: tuple[int, ...]) -> float:
    """A layer's density, up to the factor that all layers share."""
    product = 1
    for size in shape:
        product *= size
    return sum(shape) / product


def _filled(
    rates: Sequence[float], sizes: Sequence[int], least: Sequence[int], keep: int
) -> list[int]:
    """Whole numbers in proportion to ``rate · size`` within bounds that add up to ``keep``."""
    rate = torch.tensor(rates, dtype=torch.float64)
    size = torch.tensor(sizes, dtype=torch.float64)
    low = torch.tensor(least, dtype=torch.float64)

    def at(factor: float) -> Tensor:
        return torch.minimum(torch.maximum(factor * rate * size, low), size)

    below, above = 0.0, float((1 / rate).max())
    for _ in range(100):
        middle = (below + above) / 2
        below, above = (middle, above) if float(at(middle).sum()) <= keep else (below, middle)
    exact = at(below)
    whole = exact.floor()
    # What rounding down has left goes to those that lost most by it.
    for index in (whole - exact).sort(stable=True).indices.tolist():
        if int(whole.sum()) == keep:
            break
        whole[index] = min(float(whole[index]) + 1, sizes[index])
    return [int(count) for count in whole.tolist()]
