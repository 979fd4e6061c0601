"""Old samples beside new ones, labelled as nobody's.

A batch norm must see both in one batch: if it saw batches of old samples alone, it would normalise
the difference away that is to be learned, and only while training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from neusemslice._progress import length
from neusemslice.graph import Inputs
from neusemslice.maintain.holdout import Part
from neusemslice.maintain.tasks import NOBODY
from neusemslice.profiling import batches


def replayed(old: Iterable[Any] | None, share: float, known: Sequence[int]) -> Iterable[Any] | None:
    """Some old samples, labelled ``NOBODY``; ``None`` for a share of 0.

    Args:
        share: which of them, by their content.
        known: classes that they may be of.
    """
    if old is None or not share:
        return None
    some = old if share == 1 else Part(old, share, held=True, caller="extend")
    return _Nobodys(some, set(known))


class _Nobodys:
    """The batches of a loader of old samples, labelled ``NOBODY``."""

    def __init__(self, loader: Iterable[Any], known: set[int]) -> None:
        self._loader = loader
        self._known = known

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for inputs, labels in batches(self._loader, "extend"):
            if strange := sorted(set(labels.unique().tolist()) - self._known - {-100}):
                raise ValueError(f"extend: old samples must be of old classes, got {strange}")
            yield _batch(inputs, torch.where(labels == -100, labels, NOBODY))


class Together:
    """The batches of a loader, each made one with a batch of another, which begins anew."""

    def __init__(self, loader: Iterable[Any], other: Iterable[Any], what: str) -> None:
        self._loader = loader
        self._other = other
        self._what = what

    def __len__(self) -> int:
        count = length(self._loader)
        if count is None:
            raise TypeError("the loader has no length")
        return count

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        others: Iterator[tuple[Inputs, Tensor]] = iter(())
        for inputs, labels in batches(self._loader, self._what):
            if (more := next(others, None)) is None:
                others = batches(self._other, self._what)
                more = next(others)
            yield _batch(_joined(inputs, more[0]), torch.cat([labels, more[1]]))


def _joined(one: Inputs, two: Inputs) -> Inputs:
    return Inputs(
        tuple(_cat(a, b) for a, b in zip(one.args, two.args, strict=True)),
        {name: _cat(value, two.kwargs[name]) for name, value in one.kwargs.items()},
    )


def _cat(one: Any, two: Any) -> Any:
    return torch.cat([one, two]) if isinstance(one, Tensor) and one.ndim else one


def _batch(inputs: Inputs, labels: Tensor) -> tuple[Any, ...]:
    return (*inputs.args, labels) if inputs.args else (inputs.kwargs, labels)
