"""A user's own file that names a model and data, so that any of them work without a registry."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from neusemslice.profiling import unlabelled

_REMEMBERED = "task.json"
"""In the folder that commands write into: which task file they were given."""


class Task:
    """The functions of a task file.

    ``model()`` returns the trained model and ``train()`` a loader of labelled batches. Optional are
    ``test()``, a loader to score models with, ``new()``, a loader of new samples,
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

    def new(self) -> Iterable[Any]:
        """The loader of new samples.

        Raises:
            ValueError: if the file has no function ``new``.
        """
        function = self.optional("new")
        if not callable(function):
            raise ValueError(f"{self.path} has no function new(), which returns the new samples")
        loader: Iterable[Any] = function()
        return loader

    def optional(self, name: str) -> Any:
        """What the file calls ``name``, or None."""
        return getattr(self._module, name, None)


def remember(task: Path, run: Path) -> None:
    """Notes in a folder which task file it belongs to, so that later commands find it.

    The path is relative to the folder: both may be moved together.
    """
    run.mkdir(parents=True, exist_ok=True)
    target = run / _REMEMBERED
    temporary = run / f".{_REMEMBERED}.{secrets.token_hex(8)}"
    temporary.write_text(json.dumps({"task": os.path.relpath(task, run)}) + "\n")
    temporary.replace(target)


def remembered(run: Path) -> Task:
    """The task that a folder belongs to.

    Raises:
        FileNotFoundError: if the folder knows none, or the file is gone.
        ValueError: if what it knows cannot be read, or as for ``Task``.
    """
    note = run / _REMEMBERED
    if not note.is_file():
        raise FileNotFoundError(f"{note}: no such file; neusemslice profile writes it")
    try:
        path = run / json.loads(note.read_text())["task"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{note} is damaged: {error!r}") from error
    return Task(Path(os.path.normpath(path)))


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


def beginning(loader: Iterable[Any], samples: int) -> list[Any]:
    """The first batches of a loader, as many as hold that many samples, or all.

    Raises:
        ValueError: if there is none, or none is asked for.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    found: list[Any] = []
    count = 0
    for batch in loader:
        found.append(batch)
        count += next(unlabelled([batch], "train()")).samples
        if count >= samples:
            break
    return found


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
