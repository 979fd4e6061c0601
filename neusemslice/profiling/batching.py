"""Batches in the forms that loaders give, taken apart into inputs and labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neusemslice.graph import Inputs

LabelsOf = Callable[[Any], Any]
"""Takes a batch as the loader gave it and returns its labels."""

_LABEL_KEYS = ("labels", "label")


def batches(
    loader: Iterable[Any],
    caller: str,
    labels_of: LabelsOf | None = None,
    *,
    soft: bool = False,
) -> Iterator[tuple[Inputs, Tensor]]:
    """Inputs and labels of each batch, on the devices where the loader has them.

    A batch is ``(x, …, labels)``, or a mapping (transformers' ``BatchEncoding`` is one) or
    dataclass with "labels" or "label" whose other items are the model's keyword arguments. A
    mapping that stands alone before the labels holds keyword arguments too. With ``labels_of``,
    that function gives the labels, and a tensor or a tuple's whole content is the input.

    Args:
        caller: the function that messages name.
        soft: whether labels may be floating-point ``[N, K]``.

    Raises:
        TypeError: if a batch has none of these forms, or labels are not numbers of classes.
        ValueError: if labels are not one number per sample, or the loader yields nothing.
    """
    index = -1
    for index, batch in enumerate(loader):
        where = f"{caller}: batch {index}"
        inputs, raw = take_apart(batch, where, labels_of)
        yield inputs, as_labels(raw, where, soft=soft)
    if index < 0:
        raise ValueError(f"{caller}: the loader yielded no batch")


def unlabelled(loader: Iterable[Any], caller: str) -> Iterator[Inputs]:
    """Inputs of each batch, with labels or without, on the devices where the loader has them.

    Raises:
        TypeError: if a batch has none of the known forms.
        ValueError: if the loader yields nothing.
    """
    index = -1
    for index, batch in enumerate(loader):
        if isinstance(batch, Tensor):
            yield Inputs((batch,))
        elif (named := _named(batch)) is not None:
            yield Inputs(kwargs={k: v for k, v in named.items() if k not in _LABEL_KEYS})
        else:
            yield take_apart(batch, f"{caller}: batch {index}", None)[0]
    if index < 0:
        raise ValueError(f"{caller}: the loader yielded no batch")


def first_inputs(loader: Iterable[Any], caller: str, device: torch.device) -> Inputs:
    """Inputs of the first batch, with labels or without, on ``device``.

    Raises:
        TypeError, ValueError: as ``unlabelled``.
    """
    return next(unlabelled(loader, caller)).to(device)


def label_key(named: Mapping[str, Any]) -> str | None:
    """Under which name the labels are, if they are there."""
    return next((key for key in _LABEL_KEYS if key in named), None)


def take_apart(batch: Any, where: str, labels_of: LabelsOf | None) -> tuple[Inputs, Any]:
    """Inputs and labels of a batch, as ``batches`` gives them.

    Raises:
        TypeError: if it has none of the known forms.
    """
    if (named := _named(batch)) is not None:
        key = label_key(named)
        if key is None and labels_of is None:
            raise TypeError(f"{where} has no key 'labels' or 'label', only {list(named)}")
        raw = named[str(key)] if labels_of is None else labels_of(batch)
        return Inputs(kwargs={k: v for k, v in named.items() if k != key}), raw
    if labels_of is not None:
        args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        return Inputs(args), labels_of(batch)
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        if len(batch) == 2 and isinstance(batch[0], Mapping):
            return Inputs(kwargs=dict(batch[0])), batch[1]
        return Inputs(tuple(batch[:-1])), batch[-1]
    raise TypeError(
        f"{where} must be (inputs, labels), or a mapping or dataclass with 'labels', "
        f"got {type(batch).__name__}"
    )


def _named(batch: Any) -> Mapping[str, Any] | None:
    """The batch's content by name, where it has names."""
    if isinstance(batch, Mapping):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return None


def as_inputs(inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | Inputs) -> Inputs:
    """What a model is called with: a tensor, a tuple of arguments, or keyword arguments."""
    if isinstance(inputs, Inputs):
        return inputs
    if isinstance(inputs, Tensor):
        return Inputs((inputs,))
    return Inputs(kwargs=inputs) if isinstance(inputs, Mapping) else Inputs(tuple(inputs))


def as_labels(raw: Any, where: str, *, soft: bool = False) -> Tensor:
    """Labels as int64, from a tensor, list or array of integers; soft ones keep their dtype.

    Args:
        soft: whether floating-point ``[N, K]`` is allowed: how much each sample belongs to each
            class.

    Raises:
        TypeError: if they are not numbers, or not integers where these are expected.
        ValueError: if they are not ``[N]``, or ``[N, T]`` for one label per token.
    """
    expected = "integers [N] or [N, T]" + (", or floating-point [N, K]" if soft else "")
    try:
        # An array may be read-only, and lists of arrays convert slowly unless numpy does it.
        labels = raw if isinstance(raw, Tensor) else torch.from_numpy(np.array(raw))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{where}: labels must be {expected}, got {type(raw).__name__}: {error}"
        ) from error
    got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
    if labels.is_floating_point() and soft and labels.ndim == 2:
        return labels.detach()
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{where}: labels must be {expected}, got {got}")
    if labels.ndim not in (1, 2):
        raise ValueError(f"{where}: labels must be {expected}, got {got}")
    return labels.long()


def as_mask(mask: Tensor, labels: torch.Size, where: str) -> Tensor:
    """A mask over tokens as bool, for labels of a shape ``[N]`` or ``[N, T]``.

    Raises:
        TypeError, ValueError: if it is floating-point, or does not fit the labels.
    """
    if mask.ndim != 2 or mask.shape[: len(labels)] != labels[: mask.ndim]:
        raise ValueError(
            f"{where}: mask must be bool [N, T] for labels {list(labels)}, got {list(mask.shape)}"
        )
    if mask.dtype.is_floating_point:
        raise TypeError(f"{where}: mask must be bool or integer [N, T], got {mask.dtype}")
    return mask.bool()
