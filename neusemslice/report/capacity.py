"""Choosing a capacity: what the old slice answers alone, against how much it frees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice._progress import track
from neusemslice.graph import evaluation
from neusemslice.maintain.consolidate import compensated, first_samples
from neusemslice.maintain.freeing import needed
from neusemslice.profiling import LabelsOf
from neusemslice.report.faithfulness import count_right
from neusemslice.slicing import SemanticSlicing, Slice

CAPACITIES = tuple(round(0.1 * step, 1) for step in range(1, 10))
"""Capacities that are tried by default: 0.1, 0.2 … 0.9."""


@dataclass(frozen=True)
class CapacityCurve:
    """Accuracy of the slice that ``extend`` would freeze, over its ``capacity``.

    Attributes:
        capacities: rising; ``T`` of them.
        free: share of the model's neurons that each frees, float64 ``[T]``.
        masked: accuracy of each slice as it is, float64 ``[T]``.
        compensated: accuracy of each after compensation, before any training, float64 ``[T]``;
            ``None`` without samples to compensate with.
        whole: accuracy of the whole model.
    """

    capacities: tuple[float, ...]
    free: Tensor
    masked: Tensor
    compensated: Tensor | None
    whole: float

    def largest(self, loss: float) -> float | None:
        """The largest capacity at which no more than ``loss`` of accuracy is lost, if there is one.

        By the accuracy after compensation where it is known.
        """
        accuracy = self.masked if self.compensated is None else self.compensated
        fine = [
            c
            for c, a in zip(self.capacities, accuracy.tolist(), strict=True)
            if a >= self.whole - loss
        ]
        return fine[-1] if fine else None


def capacity_curve(
    model: nn.Module,
    slicing: SemanticSlicing,
    loader: Iterable[Any],
    *,
    calibration: Iterable[Any] | None = None,
    capacities: Sequence[float] = CAPACITIES,
    labels: LabelsOf | None = None,
) -> CapacityCurve:
    """Measures what the old classes' slice answers alone at several capacities.

    The model runs in evaluation mode and is left as it was. It goes through the loader once for
    each capacity, and once whole; twice for each with ``calibration``.

    Args:
        model: that the slicing was made for.
        slicing: of the old classes.
        loader: old samples to score, best ones that were not profiled.
        calibration: old samples to compensate with, as ``extend`` does with its ``old``; of a long
            loader the first 2,048.
        capacities: in (0, 1).
        labels: for batches of another form; takes a batch and returns its labels.

    Raises:
        ValueError: for no capacity or one outside (0, 1), a loader that can be gone through only
            once, a model of another structure, or labels that do not fit the model's answers.
    """
    tried = sorted(set(capacities))
    if not tried or not all(0 < capacity < 1 for capacity in tried):
        raise ValueError(f"capacity_curve: capacities must lie in (0, 1), got {tuple(capacities)}")
    if iter(loader) is loader:
        raise ValueError(
            "capacity_curve: the loader must give its batches again for each slice, but an "
            "iterator is used up after one"
        )
    whole = Slice.whole(slicing.profile.graph)
    whole.check_model(model)

    def accuracy(answering: nn.Module, kept: Slice) -> float:
        with evaluation(answering), torch.no_grad(), kept.masking(answering):
            hits, samples = count_right(
                "capacity_curve", answering, loader, slicing.profile.num_classes, labels
            )
        return float(hits.sum()) / float(samples.sum())

    free, masked, fitted = [], [], []
    few = None if calibration is None else first_samples(calibration)
    for capacity in track(tried, "capacity_curve"):
        kept = needed(model, slicing, capacity, few, "capacity_curve")
        free.append((~kept).density)
        masked.append(accuracy(model, kept))
        if few is not None:
            fitted.append(accuracy(compensated(model, kept, few)[0], kept))
    return CapacityCurve(
        capacities=tuple(tried),
        free=torch.tensor(free, dtype=torch.float64),
        masked=torch.tensor(masked, dtype=torch.float64),
        compensated=torch.tensor(fitted, dtype=torch.float64) if fitted else None,
        whole=accuracy(model, whole),
    )
