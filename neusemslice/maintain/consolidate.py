"""Consolidation: a slice made to stand alone, before it is frozen.

The neurons outside are cut out of a copy, which is compensated (``maintain/compensate.py``) with
old samples, and what is left is written back to its places in the whole model. Then the slice and
the head are trained briefly on the old samples with all else masked. Neither step touches another
neuron's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neusemslice.graph import Inputs, weight_dims
from neusemslice.graph.cut import left_in, tensors_of
from neusemslice.maintain.compensate import Refit, compensate
from neusemslice.maintain.cutting import prune
from neusemslice.maintain.tasks import batch_norms
from neusemslice.maintain.training import Training, fit
from neusemslice.optim import MaskedAdamW, row_gradients
from neusemslice.profiling import unlabelled
from neusemslice.slicing import Slice

SAMPLES = 2048
"""So many old samples, if there are as many, are compensated with."""

_ROWS_PER_FEATURE = 4
"""Below so many rows for each of a layer's features a fit would be to chance."""


@dataclass(frozen=True)
class Consolidation:
    """What consolidation did.

    Attributes:
        refits: per layer that compensation fitted, the share of its answer's variance that it
            missed before and after; empty if there are too few old samples to compensate with.
        training: steps, seconds, losses and bytes of optimizer state of the training after it.
    """

    refits: dict[str, Refit]
    training: Training


def consolidate(
    model: nn.Module,
    kept: Slice,
    old: Iterable[Any],
    epochs: int,
    lr: float,
    weight_decay: float,
) -> tuple[nn.Module, Consolidation]:
    """A copy of the model whose slice answers alone.

    Args:
        kept: closed, of ``model``.
        old: labelled samples that the slice is to answer.
        epochs, lr, weight_decay: of the training.
    """
    base, refits = compensated(model, kept, old)
    head = base.get_submodule(kept.graph.outputs[0])
    groups = [*kept.parameters(base), {"params": list(head.parameters())}]
    with kept.applied(base), row_gradients(base, groups) as rows:
        optimizer = MaskedAdamW(rows.groups(), lr=lr, weight_decay=weight_decay)
        # Running statistics too have to become those of the slice alone.
        norms = batch_norms(base).values()
        training = fit(base, old, optimizer, epochs, what="consolidate", moving=norms)
    return base, Consolidation(refits, training)


def compensated(
    model: nn.Module, kept: Slice, samples: Iterable[Any]
) -> tuple[nn.Module, dict[str, Refit]]:
    """A copy of the model whose slice was fitted to what the whole model answers."""
    base = copy.deepcopy(model)
    some = _some(samples)
    if not _enough(model, kept, sum(inputs.samples for inputs in some)):
        return base, {}
    small = prune(model, kept)
    loader = [_batch(inputs) for inputs in some]
    refits = compensate(model, small, kept, loader, "consolidate")
    _write_back(base, small, kept)
    return base, refits


def first_samples(samples: Iterable[Any]) -> list[Any]:
    """What is compensated with: the first batches, without labels."""
    return [_batch(inputs) for inputs in _some(samples)]


def _some(samples: Iterable[Any]) -> list[Inputs]:
    """The first batches, until there are enough samples."""
    some: list[Inputs] = []
    count = 0
    for inputs in unlabelled(samples, "consolidate"):
        some.append(inputs)
        count += inputs.samples
        if count >= SAMPLES:
            break
    return some


def _batch(inputs: Inputs) -> Any:
    """As a loader without labels gives it."""
    if inputs.kwargs:
        return dict(inputs.kwargs)
    return inputs.args[0] if len(inputs.args) == 1 else (*inputs.args, torch.empty(0))


def _enough(model: nn.Module, kept: Slice, samples: int) -> bool:
    """Whether every layer gets enough rows (samples times positions) to be fitted."""
    left = left_in(kept.graph, kept.masks(), tensors_of(model))
    for layer in kept.graph.layers:
        weight = model.get_submodule(layer.name).get_parameter("weight")
        _, dim = weight_dims(model.get_submodule(layer.name))
        inputs = left.get(f"{layer.name}.weight", {}).get(dim)
        share = 1.0 if inputs is None else float(inputs.double().mean())
        features = share * weight.shape[dim] * weight[0, 0].numel()
        if samples * layer.macs / weight.numel() < _ROWS_PER_FEATURE * features:
            return False
    return True


@torch.no_grad()
def _write_back(base: nn.Module, small: nn.Module, kept: Slice) -> None:
    """Puts the tensors of the small model to where they were cut out."""
    whole, cut = tensors_of(base), left_in(kept.graph, kept.masks(), tensors_of(base))
    for name, part in tensors_of(small).items():
        places = [
            cut.get(name, {}).get(dim, torch.ones(size, dtype=torch.bool)).nonzero().squeeze(1)
            for dim, size in enumerate(whole[name].shape)
        ]
        if places and name in cut:
            whole[name][torch.meshgrid(*places, indexing="ij")] = part.to(whole[name].device)
        else:
            whole[name].copy_(part)
