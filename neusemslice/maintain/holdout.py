"""Loaders made of other loaders: some of the samples, or labels from elsewhere in the batch.

Which samples are held out, their own content decides, by a hash: the same in every pass, epoch and
process, in whatever order a loader shuffles its samples, and alike samples are never on both sides.
A loader that changes its samples at random has no fixed content, and cannot be divided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from neusemslice._progress import length
from neusemslice.graph import Inputs, tensors_in
from neusemslice.profiling import LabelsOf, batches


class _Derived:
    """A loader made of another one, with as many batches."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        """Batches of the other loader.

        Raises:
            TypeError: if it does not know them.
        """
        count = length(self.loader)
        if count is None:
            raise TypeError("the loader has no length")
        return count


class Labelled(_Derived):
    """The batches of a loader as ``(x, …, labels)``, with the labels that a function finds."""

    def __init__(self, loader: Iterable[Any], labels: LabelsOf, caller: str) -> None:
        super().__init__(loader)
        self._labels, self._caller = labels, caller

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for inputs, labels in batches(self.loader, self._caller, self._labels):
            yield _plain(inputs, labels)


class Part(_Derived):
    """The samples of a loader that are held out, or those that are not; nothing is kept.

    Its batches are those of the loader, smaller; a batch of which nothing is left is left out. If
    that holds for all, iterating raises a ``ValueError``.

    Args:
        share: of the samples, in (0, 1), that is held out.
        held: which side this is.
    """

    def __init__(self, loader: Iterable[Any], share: float, *, held: bool, caller: str) -> None:
        super().__init__(loader)
        self._share, self._held, self._caller = share, held, caller

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        empty = True
        for inputs, labels in batches(self.loader, self._caller):
            chosen = held_out(inputs, self._share) == self._held
            if bool(chosen.any()):
                empty = False
                yield _plain(inputs.take(chosen), labels[chosen.to(labels.device)])
        if empty:
            raise ValueError(
                f"{self._caller}: validation={self._share} holds "
                f"{'none' if self._held else 'all'} of the samples out"
            )


def held_out(inputs: Inputs, share: float) -> Tensor:
    """Which samples of a batch are held out, bool ``[N]`` on the CPU."""
    samples = inputs.samples
    hashes = [hashlib.blake2b(digest_size=8) for _ in range(samples)]
    for tensor in tensors_in([*inputs.args, inputs.kwargs]):
        if tensor.ndim and len(tensor) == samples and tensor.numel():
            raw = tensor.detach().cpu().reshape(samples, -1).contiguous().view(torch.uint8).numpy()
            for digest, row in zip(hashes, raw, strict=True):
                digest.update(row)
    limit = int(share * 2**64)
    return torch.tensor([int.from_bytes(h.digest(), "little") < limit for h in hashes])


def _plain(inputs: Inputs, labels: Tensor) -> tuple[Any, ...]:
    return (*inputs.args, labels) if inputs.args else (inputs.kwargs, labels)
