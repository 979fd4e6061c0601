"""Removing redundant layers, after DeepArc (Ren et al., ICSE 2023).

Consecutive layers whose outputs are alike form a module, and one of them can do its work: all
behind its first are removed. Layers are alike if their unbiased linear CKA, estimated in
mini-batches (Nguyen et al. 2021), is above a threshold between 0.90 and 0.99. This follows the
published idea; the authors' code is not used.

A layer can be removed where what it reads has the shape of what it gives: residual blocks of
unchanged width, transformer blocks, convolutions and linear layers of a plain sequence.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bench.cifar import Block
from neusemslice.profiling import LinearCKA

THRESHOLDS = tuple(round(0.9 + step / 100, 2) for step in range(10))


class Nothing(nn.Module):
    """Stands where a layer was."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def units(model: nn.Module) -> list[tuple[str, ...]]:
    """The modules of each layer that can be removed, in the order in which they run."""
    found: list[tuple[str, ...]] = []
    for name, module in model.named_modules():
        if isinstance(module, Block):
            if not module.added and module.stride == 1:
                found.append((name,))
        elif type(module).__name__ == "ViTLayer":
            found.append((name,))
        elif isinstance(module, nn.Sequential):
            children = [(f"{name}.{key}".lstrip("."), m) for key, m in module.named_children()]
            for (own, layer), (behind, norm) in itertools.pairwise([*children, ("", Nothing())]):
                if _keeps_shape(layer):
                    found.append((own, behind) if isinstance(norm, nn.BatchNorm2d) else (own,))
    return found


def _keeps_shape(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str):
        return False
    same = all(
        stride == 1 and 2 * padding == kernel - 1
        for stride, padding, kernel in zip(
            layer.stride, layer.padding, layer.kernel_size, strict=True
        )
    )
    return same and layer.in_channels == layer.out_channels


@torch.no_grad()
def likeness(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """Of each of ``units``, the CKA of what it reads, which the layer before gives, and gives."""
    found = [LinearCKA() for _ in units(model)]
    with ExitStack() as stack:
        for unit, state in zip(units(model), found, strict=True):
            seen: dict[str, Tensor] = {}

            def reads(module: nn.Module, args: Any, seen: dict[str, Tensor] = seen) -> None:
                seen["reads"] = args[0]

            def gives(
                module: nn.Module,
                args: Any,
                out: Any,
                seen: dict[str, Tensor] = seen,
                state: LinearCKA = state,
            ) -> None:
                state.update({**seen, "gives": out if isinstance(out, Tensor) else out[0]})

            first, last = (model.get_submodule(unit[place]) for place in (0, -1))
            stack.callback(first.register_forward_pre_hook(reads).remove)
            stack.callback(last.register_forward_hook(gives).remove)
        for x, _ in batches:
            model(x)
    return [float(state.compute().values[0, 1]) for state in found]


def without(model: nn.Module, alike: list[float], threshold: float) -> nn.Module | None:
    """A copy without the layers that are alike; ``None`` if there is none."""
    gone = [unit for unit, value in zip(units(model), alike, strict=True) if value > threshold]
    if not gone:
        return None
    smaller = copy.deepcopy(model)
    for name in itertools.chain.from_iterable(gone):
        smaller.set_submodule(name, Nothing())
    return smaller
