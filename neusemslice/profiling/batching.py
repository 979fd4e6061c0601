"""Batches in the forms that loaders give, taken apart into inputs and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from neusemslice.graph import Inputs

LabelsOf = Callable[[Any], Any]
"""Takes a batch as the loader gave it and returns its labels."""

_LABEL_KEYS = ("labels", "label")


def batches(
    loader: Iterable[Any],
    caller: str,
    device: torch.device,
    labels_of: LabelsOf | None = None,
) -> Iterator[tuple[Inputs, Tensor]]:
    """Inputs of each batch on ``device``, and labels where the loader has them.

    A batch is ``(x, …, labels)``, or a mapping with a key "labels" or "label" whose other items
    are the model's keyword arguments. With ``labels_of``, that function gives the labels, and a
    tensor or a tuple's whole content is the input.

    Args:
        caller: the function that messages name.

    Raises:
        TypeError: if a batch has none of these forms, or labels are not integers.
        ValueError: if labels are not one number per sample, or the loader yields nothing.
    """
    index = -1
    for index, batch in enumerate(loader):
        inputs, raw = _take_apart(batch, f"{caller}: batch {index}", labels_of)
        labels = as_labels(raw, f"{caller}: batch {index}")
        yield inputs.to(device), labels
    if index < 0:
        raise ValueError(f"{caller}: the loader yielded no batch")


def first_inputs(loader: Iterable[Any], caller: str, device: torch.device) -> Inputs:
    """Inputs of the first batch, with labels or without, on ``device``.

    Raises:
        ValueError: if the loader yields nothing.
    """
    for batch in loader:
        if isinstance(batch, Tensor):
            return Inputs((batch,)).to(device)
        if isinstance(batch, Mapping):
            unlabelled = {k: v for k, v in batch.items() if k not in _LABEL_KEYS}
            return Inputs(kwargs=unlabelled).to(device)
        return _take_apart(batch, f"{caller}: batch 0", None)[0].to(device)
    raise ValueError(f"{caller}: the loader yielded no batch")


def _take_apart(batch: Any, where: str, labels_of: LabelsOf | None) -> tuple[Inputs, Any]:
    if isinstance(batch, Mapping):
        key = next((k for k in _LABEL_KEYS if k in batch), None)
        if key is None and labels_of is None:
            raise TypeError(f"{where} has no key 'labels' or 'label', only {sorted(batch)}")
        raw = batch[key] if labels_of is None else labels_of(batch)
        return Inputs(kwargs={k: v for k, v in batch.items() if k != key}), raw
    if labels_of is not None:
        args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        return Inputs(args), labels_of(batch)
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return Inputs(tuple(batch[:-1])), batch[-1]
    raise TypeError(
        f"{where} must be (inputs, labels) or a mapping with 'labels', got {type(batch).__name__}"
    )


def as_labels(raw: Any, where: str) -> Tensor:
    """Labels as int64, from a tensor, list or array of integers.

    Raises:
        TypeError: if they are not integers.
        ValueError: if they are not ``[N]``, or ``[N, T]`` for one label per token.
    """
    labels = torch.as_tensor(raw)
    described = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{where}: labels must be integers [N] or [N, T], got {described}")
    if labels.ndim not in (1, 2):
        raise ValueError(f"{where}: labels must be integers [N] or [N, T], got {described}")
    return labels.long()
