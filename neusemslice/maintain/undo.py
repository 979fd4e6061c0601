"""Undo: what turns a restructured model back into the one that it comes from.

Of each tensor that was cut it holds the elements that went. What happened to the elements that
stayed (compensation, and training up to the time when the undo is made) is a ``Delta`` from the
parent's own part to the restructured model. So its size follows what was removed and changed, and
the parent comes back bit for bit. A digest of the parent is compared before it is handed out.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice import _files
from neusemslice.graph import cut, fingerprint, grow, removed_indices
from neusemslice.maintain.delta import Delta, digest_of, saved_tensors
from neusemslice.slicing import Slice


class Undo:
    """What turns a restructured model back into its parent.

    Made by ``Undo.between`` or ``Undo.load``.
    """

    def __init__(self, kept: Slice, parent: str, removed: Mapping[str, Tensor], changed: Delta):
        self._kept = kept
        self._parent = parent
        self._removed = dict(removed)
        self._changed = changed

    @classmethod
    def between(cls, model: nn.Module, small: nn.Module, kept: Slice) -> Undo:
        """The way back from what is left of a model, compensated and trained or not.

        Args:
            model: the parent; left as it was.
            small: what restructuring made of it; left as it was.
            kept: the slice that ``small`` holds.

        Raises:
            ValueError: if the slice belongs to another model, or ``small`` has not the structure
                or the dtypes of what the slice leaves.
        """
        kept.check_model(model)
        changed = Delta.between(cut(model, kept.graph, kept.masks()), small)
        whole = saved_tensors(model)
        removed = {
            name: whole[name][~_left(whole[name].shape, dims)].cpu()
            for name, dims in _gone(small, kept).items()
        }
        return cls(kept, digest_of(model), removed, changed)

    @property
    def kept(self) -> Slice:
        """What of the parent was left."""
        return self._kept

    @property
    def nbytes(self) -> int:
        """Bytes of the elements that were removed and of the rows that changed."""
        return self._changed.nbytes + sum(tensor.nbytes for tensor in self._removed.values())

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self._removed.values())
        return f"Undo({count} elements removed, {self._changed!r}, {self.nbytes:,} bytes)"

    def parent(self, small: nn.Module) -> nn.Module:
        """The parent, bit for bit; ``small`` is left as it was.

        Settings that are neither tensors nor sizes (``requires_grad``, modes) are those of
        ``small``.

        Raises:
            ValueError: if ``small`` is not the model that the undo was made for, or has changed
                since, or the undo is damaged.
        """
        own = copy.deepcopy(small)
        try:
            self._changed.remove(own)
        except ValueError as error:
            raise ValueError(
                f"Undo.parent: this is not the model that the undo was made for, or it was "
                f"trained since: {error}"
            ) from error
        whole = self.whole(own)
        if (found := digest_of(whole)) != self._parent:
            raise ValueError(
                f"Undo.parent: the model was changed since the undo was made, or the undo is "
                f"damaged: the parent has digest {self._parent}, this gives {found}"
            )
        return whole

    def whole(self, small: nn.Module) -> nn.Module:
        """A model of the parent's sizes: the removed neurons beside what ``small`` is now.

        Raises:
            ValueError: if ``small`` has another structure, or the undo is damaged.
        """
        if (found := fingerprint(small)) != self._changed.structure:
            raise ValueError(
                f"Undo: the undo belongs to another model: it was made for structure "
                f"{self._changed.structure}, {type(small).__name__} has {found}"
            )
        own = saved_tensors(small)
        tensors = {}
        for name, dims in _gone(small, self._kept).items():
            if name not in self._removed or self._removed[name].dtype != own[name].dtype:
                raise ValueError(f"Undo: the undo has no {own[name].dtype} elements of {name}")
            tensors[name] = _filled(name, own[name], dims, self._removed[name])
        return grow(small, self._kept.graph, self._kept.masks(), tensors)

    # Files.

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the undo to one file, atomically."""
        words, graph = self._kept.to_file()
        delta, changes = self._changed.to_file()
        tensors = {f"kept/{name}": t for name, t in words.items()}
        tensors |= {f"removed/{name}": t for name, t in self._removed.items()}
        tensors |= {f"changed/{name}": t for name, t in delta.items()}
        content = {"kept": graph, "changed": changes, "parent": self._parent}
        return _files.write(path, "undo", tensors, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Undo:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """

        def build(tensors: dict[str, Tensor], content: dict[str, Any]) -> Undo:
            return cls(
                Slice.from_file(_files.under("kept/", tensors), content["kept"]),
                str(content["parent"]),
                _files.under("removed/", tensors),
                Delta.from_file(_files.under("changed/", tensors), content["changed"]),
            )

        return _files.read(path, "undo", build)


def _gone(small: nn.Module, kept: Slice) -> dict[str, dict[int, Tensor]]:
    """``removed_indices``, by the first name of tensors that have several."""
    named = small.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in named.items():
        first.setdefault(id(tensor), name)
    return {
        first[id(named[name])]: dims
        for name, dims in removed_indices(kept.graph, kept.masks()).items()
    }


def _left(shape: torch.Size, gone: Mapping[int, Tensor]) -> Tensor:
    """bool of a whole tensor's shape: which of its elements the cut one has."""
    left = torch.ones(shape, dtype=torch.bool)
    for dim, indices in gone.items():
        left.index_fill_(dim, indices, False)
    return left


def _filled(name: str, part: Tensor, gone: Mapping[int, Tensor], removed: Tensor) -> Tensor:
    """A whole tensor from what a cut left of it and what it took."""
    shape = torch.Size(size + len(gone.get(dim, ())) for dim, size in enumerate(part.shape))
    if removed.shape != (shape.numel() - part.numel(),):
        raise ValueError(f"Undo: the undo is damaged in its elements of {name}")
    left = _left(shape, gone).to(part.device)
    whole = part.new_empty(shape)
    whole[left] = part.flatten()
    whole[~left] = removed.to(part.device)
    return whole
