"""A user's own file that names a model and data, so that any of them work without a registry."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


class Task:
    """The functions of a task file.

    ``model()`` returns the trained model and ``train()`` a loader of labelled batches. Optional are
    ``loss(output, labels)`` and ``labels(batch)``, as for ``neusemslice.profile``, and a sequence
    ``class_names``.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be imported, or lacks ``model`` or ``train``; names what is wrong.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self.path = path
        self._module = _import(path)
        for name in ("model", "train"):
            if not callable(getattr(self._module, name, None)):
                raise ValueError(f"{path} has no function {name}()")

    def model(self) -> nn.Module:
        """The model.

        Raises:
            TypeError: if the file's function returns something else.
        """
        model = self._module.model()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{self.path}: model() must return a torch.nn.Module, got {type(model).__name__}"
            )
        return model

    def train(self) -> Iterable[Any]:
        """The loader."""
        loader: Iterable[Any] = self._module.train()
        return loader

    def optional(self, name: str) -> Any:
        """What the file calls ``name``, or None."""
        return getattr(self._module, name, None)


def _import(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    # Its own folder comes first, as if the file had been run.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def shard(loader: Iterable[Any], rank: int, world: int) -> Iterator[Any]:
    """Every ``world``-th batch of a loader, from the ``rank``-th on.

    Raises:
        ValueError: if there is none.
    """
    empty = True
    for batch in itertools.islice(loader, rank, None, world):
        empty = False
        yield batch
    if empty:
        raise ValueError(f"rank {rank} of {world} has no batch: the loader gives too few")
