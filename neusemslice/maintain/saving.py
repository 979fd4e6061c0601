"""A restructured model in a file.

What is left of a model cannot be built from its class alone: its layers have other sizes. The file
holds its tensors and the slice that they are of, graph included. A model of the parent's structure,
freshly built, is cut to that slice and then takes the tensors; neither data nor tracing is needed.
Digests of structure and content are compared before it is handed out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice import _files
from neusemslice.graph import cut, fingerprint
from neusemslice.maintain.delta import digest_of, saved_tensors
from neusemslice.slicing import Slice


def write_model(
    path: str | os.PathLike[str], small: nn.Module, kept: Slice, more: Mapping[str, Any]
) -> Path:
    """Writes what is left of a model, atomically; ``more`` is JSON that is kept beside it."""
    words, graph = kept.to_file()
    tensors = {f"kept/{name}": t for name, t in words.items()}
    tensors |= {f"model/{name}": t for name, t in saved_tensors(small).items()}
    content = {"kept": graph, "structure": fingerprint(small), "digest": digest_of(small)}
    return _files.write(path, "restructured model", tensors, content | {"more": dict(more)})


def read_model(
    path: str | os.PathLike[str], model: nn.Module
) -> tuple[nn.Module, Slice, dict[str, Any]]:
    """Reads what ``write_model`` wrote, bit for bit.

    Args:
        path: the file.
        model: of the parent's structure; its values do not matter, and it is left as it was.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    found = _files.read(path, "restructured model", lambda *both: both)
    kept = _files.built(
        path, lambda: Slice.from_file(_files.under("kept/", found[0]), found[1]["kept"])
    )
    try:
        kept.check_model(model)
    except ValueError as error:
        raise ValueError(f"{Path(path)}: {error}") from error

    def build() -> tuple[nn.Module, Slice, dict[str, Any]]:
        tensors, content = found
        small = cut(model, kept.graph, kept.masks())
        _take(small, _files.under("model/", tensors))
        if fingerprint(small) != content["structure"] or digest_of(small) != content["digest"]:
            raise ValueError("the digest of its tensors is another")
        return small, kept, dict(content["more"])

    return _files.built(path, build)


@torch.no_grad()
def _take(small: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a model the tensors, in their dtypes."""
    own = saved_tensors(small)
    if differ := sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"the file or the model has no {differ[0]}")
    for name, tensor in small.state_dict(keep_vars=True).items():
        if name not in own:
            continue  # another name of the same tensor
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{name} must have shape {list(tensor.shape)}, has {list(tensors[name].shape)}"
            )
        # In memory of its own, aligned as torch's is: BLAS may sum in another order elsewhere.
        tensor.data = tensors[name].to(tensor.device, copy=True)
