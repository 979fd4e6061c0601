"""Does a slicing find the neurons that matter? What the model still answers with them, and without.

At each threshold the model answers three times: with the slice alone (the neurons that are critical
to any class), with its complement alone, and with random slices that have as many neurons at every
site. A faithful metric keeps more accuracy than chance with few neurons, and less without them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from neusemslice._progress import track
from neusemslice.graph import Inputs, device_of, evaluation, logits_of
from neusemslice.profiling import LabelsOf, batches
from neusemslice.report.figures import plot_faithfulness
from neusemslice.report.tables import faithfulness_table
from neusemslice.slicing import SemanticSlicing, Slice, critical_sets

THRESHOLDS = (0.5, 0.7, 0.9)
"""Thresholds that are tried besides the slicing's own."""


@dataclass(frozen=True)
class Faithfulness:
    """Accuracy of slices, their complements and random slices, per class.

    Attributes:
        metric: by which the slices were chosen.
        class_names: ``K`` names.
        samples: of each class, int64 ``[K]``.
        thresholds: θ of each slice, ascending; ``T`` of them.
        density: share of the model's neurons in each slice, float64 ``[T]``.
        whole: accuracy of the whole model on each class, float64 ``[K]``; NaN without samples.
        kept: with each slice alone, ``[T, K]``.
        dropped: with its complement alone, ``[T, K]``.
        random: with random slices of equal size at every site, ``[T, draws, K]``.
    """

    metric: str
    class_names: tuple[str, ...]
    samples: Tensor
    thresholds: tuple[float, ...]
    density: Tensor
    whole: Tensor
    kept: Tensor
    dropped: Tensor
    random: Tensor

    def over_classes(self, accuracy: Tensor) -> Tensor:
        """Accuracy over all samples, from accuracies ``[..., K]`` of their classes."""
        share = self.samples.double() / self.samples.sum()
        return (accuracy.nan_to_num() * share).sum(-1)

    def chance(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the random slices' accuracy on all samples, ``[T]``.

        The deviation is NaN for a single draw.
        """
        each = self.over_classes(self.random)
        alone = each.shape[1] == 1
        return each.mean(1), each[:, 0] * math.nan if alone else each.std(1)

    def table(self) -> Table:
        """A table for a terminal: ``rich.print(found.table())``."""
        return faithfulness_table(self)

    def figure(self, path: str | os.PathLike[str]) -> Path:
        """Draws accuracy against θ, and by class at the largest gap to chance; gives the path.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        plot_faithfulness(self, Path(path))
        return Path(path)


def faithfulness(
    model: nn.Module,
    slicing: SemanticSlicing,
    loader: Iterable[Any],
    *,
    thresholds: Sequence[float] | None = None,
    draws: int = 5,
    seed: int = 0,
    labels: LabelsOf | None = None,
) -> Faithfulness:
    """Measures how well a slicing's neurons, and all others, answer on their own.

    The model runs in evaluation mode, with neurons outside a slice masked as by ``Slice.applied``,
    and is left as it was. It goes through the loader once for each slice: two and ``draws`` for
    each threshold, and once whole.

    Args:
        model: that the slicing was made for.
        slicing: from ``neusemslice.slice``.
        loader: batches as for ``neusemslice.profile``, best of samples that were not profiled.
        thresholds: θ in (0, 1]; by default ``THRESHOLDS`` and the slicing's own.
        draws: random slices for each threshold.
        seed: of the random slices.
        labels: for batches of another form; takes a batch and returns its labels.

    Raises:
        ValueError: for a threshold outside (0, 1], less than one draw, a loader that can be gone
            through only once, a model of another structure, labels out of range or that do not
            fit the model's answers.
    """
    tried = sorted({*THRESHOLDS, slicing.threshold} if thresholds is None else set(thresholds))
    if not tried or not all(0 < threshold <= 1 for threshold in tried):
        raise ValueError(f"faithfulness: thresholds must lie in (0, 1], got {thresholds}")
    if draws < 1:
        raise ValueError(f"faithfulness: draws must be at least 1, got {draws}")
    if iter(loader) is loader:
        raise ValueError(
            "faithfulness: the loader must give its batches again for each slice, but an iterator "
            "is used up after one"
        )
    graph = slicing.profile.graph
    generator = torch.Generator().manual_seed(seed)
    chosen = [slice_at(slicing, threshold) for threshold in tried]
    subsets = [Slice.whole(graph)]
    for subset in chosen:
        subsets += [subset, ~subset, *(_shuffled(subset, generator) for _ in range(draws))]
    subsets[0].check_model(model)
    right, samples = [], torch.zeros(0)
    with evaluation(model), torch.no_grad():
        for subset in track(subsets, "faithfulness"):
            with subset.masking(model):
                hits, samples = count_right(
                    "faithfulness", model, loader, slicing.profile.num_classes, labels
                )
            right.append(hits)
    accuracy = torch.stack(right).double() / samples
    each = accuracy[1:].view(len(tried), 2 + draws, -1)
    return Faithfulness(
        metric=slicing.metric,
        class_names=slicing.profile.class_names,
        samples=samples,
        thresholds=tuple(tried),
        density=torch.tensor([subset.density for subset in chosen], dtype=torch.float64),
        whole=accuracy[0],
        kept=each[:, 0],
        dropped=each[:, 1],
        random=each[:, 2:],
    )


def slice_at(slicing: SemanticSlicing, threshold: float) -> Slice:
    """The neurons that are critical to any class at another threshold."""
    masks = {name: critical_sets(p, threshold).any(0) for name, p in slicing.shares.items()}
    return Slice(slicing.profile.graph, masks)


def _shuffled(subset: Slice, generator: torch.Generator) -> Slice:
    """Random neurons, as many at every site."""
    masks = {
        name: mask[torch.randperm(len(mask), generator=generator)]
        for name, mask in subset.masks().items()
    }
    return Slice(subset.graph, masks)


def count_right(
    caller: str,
    model: nn.Module,
    loader: Iterable[Any],
    num_classes: int,
    labels: LabelsOf | None,
) -> tuple[Tensor, Tensor]:
    """Right answers and samples of each class, int64 ``[K]``."""
    device = device_of(model)
    hits = torch.zeros(num_classes, dtype=torch.int64, device=device)
    samples = torch.zeros_like(hits)
    inputs: Inputs
    for number, (inputs, y) in enumerate(batches(loader, caller, labels)):
        answer = logits_of(inputs.to(device).run(model)).argmax(-1)
        y = y.to(device)
        if answer.shape != y.shape:
            raise ValueError(
                f"{caller}: batch {number}: the model gives {list(answer.shape)} answers to "
                f"labels {list(y.shape)}"
            )
        answer, y = answer[y != -100], y[y != -100]
        if bool(((y < 0) | (y >= num_classes)).any()):
            raise ValueError(
                f"{caller}: batch {number}: labels must lie in [0, {num_classes}) or be -100"
            )
        samples += y.bincount(minlength=num_classes)
        hits += y[answer == y].bincount(minlength=num_classes)
    if not int(samples.sum()):
        raise ValueError(f"{caller}: the loader gave no sample with a label")
    return hits.cpu(), samples.cpu()
