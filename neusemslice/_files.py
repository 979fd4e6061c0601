"""Files: safetensors with JSON metadata, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = 3
"""Version of what the files hold; a reader takes its own version only."""

_T = TypeVar("_T")


def write(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
) -> Path:
    """Writes tensors and JSON ``content`` under a temporary name, flushes, and renames.

    Args:
        path: where to; missing folders are made. An existing file is replaced at the very end.
        kind: what the file holds ("profile", "slice", …), checked when it is read.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "kind": kind,
        "format": FORMAT,
        "neusemslice": metadata.version("neusemslice"),
        "torch": torch.__version__,
        "content": content,
    }
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    raw = save(plain, {"neusemslice": json.dumps(head, sort_keys=True)})
    # Beside the target, so that the rename stays within one file system.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target


def read(
    path: str | os.PathLike[str],
    kind: str,
    build: Callable[[dict[str, Tensor], dict[str, Any]], _T],
) -> _T:
    """Reads what ``write`` wrote and hands tensors and content to ``build``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, damaged, of another kind or of another version; the
            message says which.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    try:
        with safe_open(source, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stored = (file.metadata() or {}).get("neusemslice")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{source} is not a whole safetensors file: {error}") from error
    if stored is None:
        raise ValueError(f"{source} is a safetensors file, but none of neusemslice's")
    try:
        head = json.loads(stored)
        found, version = head["kind"], head["format"]
        if found != kind:
            raise ValueError(f"{source} holds a {found}, expected a {kind}")
        if version != FORMAT:
            raise ValueError(f"{source} is of format {version}, this version reads {FORMAT}")
        content = head["content"]
        if not isinstance(content, dict):
            raise TypeError("its content is not an object")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source} is damaged: its metadata cannot be read ({error!r})") from error
    return built(source, lambda: build(tensors, content))


def built(path: str | os.PathLike[str], build: Callable[[], _T]) -> _T:
    """What ``build`` makes of a file's content.

    Raises:
        ValueError: naming the file, if the content is not what it must be.
    """
    try:
        return build()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{Path(path)} is damaged: {error}") from error


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
