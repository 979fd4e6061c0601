"""Choosing θ: what the model answers with its critical neurons alone, against their number."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice._progress import track
from neusemslice.graph import evaluation
from neusemslice.profiling import LabelsOf
from neusemslice.report.faithfulness import count_right, slice_at
from neusemslice.report.figures import plot_theta_curve
from neusemslice.slicing import SemanticSlicing, Slice

THETAS = tuple(round(0.9 + 0.01 * step, 2) for step in range(10))
"""Thresholds that are tried by default: 0.90, 0.91 … 0.99."""


@dataclass(frozen=True)
class ThetaCurve:
    """Accuracy of the critical slice against its size, over θ.

    Attributes:
        metric: by which the slices were chosen.
        thresholds: ascending; ``T`` of them.
        density: share of the model's neurons in each slice, float64 ``[T]``.
        kept: accuracy with each slice alone, float64 ``[T]``.
        whole: accuracy of the whole model.
    """

    metric: str
    thresholds: tuple[float, ...]
    density: Tensor
    kept: Tensor
    whole: float

    @property
    def knee(self) -> int:
        """Index of the knee: the point farthest above the line from the curve's first to its last.

        Both axes are scaled to the curve's range, as in Satopää et al., Finding a "Kneedle" in a
        Haystack, 2011. Of equal points the smallest slice; where none is above the line, the one of
        greatest accuracy.
        """
        above = _scaled(self.kept) - _scaled(self.density)
        if not bool((above > 1e-9).any()):
            return int(self.kept.argmax())
        return int((above >= above.max() - 1e-9).nonzero()[0])

    def figure(self, path: str | os.PathLike[str]) -> Path:
        """Draws the curve with its knee; gives the path.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        plot_theta_curve(self, Path(path))
        return Path(path)

    def __str__(self) -> str:
        theta, size, kept = (x[self.knee] for x in (self.thresholds, self.density, self.kept))
        return (
            f"The knee is at θ = {theta:g} by {self.metric}: {size:.1%} of the neurons answer "
            f"{kept:.1%} of the samples rightly, all of them {self.whole:.1%}."
        )


def theta_curve(
    model: nn.Module,
    slicing: SemanticSlicing,
    loader: Iterable[Any],
    *,
    thresholds: Sequence[float] = THETAS,
    labels: LabelsOf | None = None,
) -> ThetaCurve:
    """Measures what the model answers with the neurons that are critical at each of several θ.

    The model runs in evaluation mode and is left as it was. It goes through the loader once for
    each threshold, and once whole.

    Args:
        model: that the slicing was made for.
        slicing: from ``neusemslice.slice``; its own threshold does not matter.
        loader: batches as for ``neusemslice.profile``, best of samples that were not profiled.
        thresholds: θ in (0, 1], two or more.
        labels: for batches of another form; takes a batch and returns its labels.

    Raises:
        ValueError: for thresholds outside (0, 1] or less than two, a loader that can be gone
            through only once, a model of another structure, labels out of range or that do not
            fit the model's answers.
    """
    tried = sorted(set(thresholds))
    if len(tried) < 2 or not all(0 < threshold <= 1 for threshold in tried):
        raise ValueError(
            f"theta_curve: thresholds must be two or more in (0, 1], got {tuple(thresholds)}"
        )
    if iter(loader) is loader:
        raise ValueError(
            "theta_curve: the loader must give its batches again for each slice, but an iterator "
            "is used up after one"
        )
    chosen = [slice_at(slicing, threshold) for threshold in tried]
    subsets = [*chosen, Slice.whole(slicing.profile.graph)]
    subsets[0].check_model(model)
    accuracy = []
    with evaluation(model), torch.no_grad():
        for subset in track(subsets, "theta_curve"):
            with subset.masking(model):
                hits, samples = count_right(
                    "theta_curve", model, loader, slicing.profile.num_classes, labels
                )
            accuracy.append(float(hits.sum()) / float(samples.sum()))
    return ThetaCurve(
        metric=slicing.metric,
        thresholds=tuple(tried),
        density=torch.tensor([subset.density for subset in chosen], dtype=torch.float64),
        kept=torch.tensor(accuracy[:-1], dtype=torch.float64),
        whole=accuracy[-1],
    )


def _scaled(values: Tensor) -> Tensor:
    """From the range of its first and last value to 0 … 1; zeros where the two are equal."""
    span = float(values[-1] - values[0])
    return (values - values[0]) / span if span else torch.zeros_like(values)
