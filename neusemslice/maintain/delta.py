"""A delta: what turns one model into another of the same structure, small and reversible.

Of each tensor it holds the rows that differ, and for these the exclusive or of their bits before
and after. One set of bits serves both ways: combined with the parent's rows it gives the child's,
and with the child's the parent's again, exactly and in any dtype, in half the size of old and new
rows. Which rows it meets, bits alone cannot tell; so it also holds digests of each tensor's rows
before and after. They say on which side of the delta a model stands, refuse any other model, and,
compared with the outcome before that is written, a damaged file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice import _files
from neusemslice.graph import fingerprint


@dataclass(frozen=True)
class _Change:
    """How one tensor differs: rows along ``dim``, its dtype, and digests of the rows."""

    dim: int
    dtype: str
    before: str
    after: str


class Delta:
    """What turns a model into another of the same structure, and back to the bit.

    Made by ``Delta.between``, ``readapt`` or ``Delta.load``.
    """

    def __init__(
        self,
        structure: str,
        changes: Mapping[str, _Change],
        rows: Mapping[str, Tensor],
        bits: Mapping[str, Tensor],
    ) -> None:
        self._structure = structure
        self._changes = dict(changes)
        self._rows = dict(rows)
        self._bits = dict(bits)

    @classmethod
    def between(
        cls, before: nn.Module, after: nn.Module, neuron_dims: Mapping[str, int] | None = None
    ) -> Delta:
        """The delta from one model to another, over all parameters and saved buffers.

        Args:
            before: the parent.
            after: the child, on the same device.
            neuron_dims: by the name of a tensor, the dimension whose rows are compared; 0 by
                default.

        Raises:
            ValueError: if the two differ in structure or in the dtype of a tensor.
        """
        structure = fingerprint(before)
        if structure != (other := fingerprint(after)):
            raise ValueError(
                f"Delta.between: the models must be of one structure, got {structure} and {other}"
            )
        changes, rows, bits = {}, {}, {}
        new = saved_tensors(after)
        for name, old in saved_tensors(before).items():
            if old.dtype != new[name].dtype:
                raise ValueError(
                    f"Delta.between: {name} must be of one dtype, got {old.dtype} and "
                    f"{new[name].dtype}"
                )
            dim = (neuron_dims or {}).get(name, 0)
            was, now = _row_bytes(old, dim), _row_bytes(new[name], dim)
            differ = (was != now).any(1).nonzero().flatten()
            if len(differ):
                was, now = was[differ], now[differ]
                changes[name] = _Change(dim, str(old.dtype), _digest(was), _digest(now))
                rows[name], bits[name] = differ.cpu(), (was ^ now).cpu()
        return cls(structure, changes, rows, bits)

    @property
    def structure(self) -> str:
        """Fingerprint of the structure that both models have."""
        return self._structure

    @property
    def rows(self) -> dict[str, Tensor]:
        """Which rows of which tensors differ, int64."""
        return dict(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that differ, and 8 for the number of each."""
        return sum(t.nbytes for part in (self._rows, self._bits) for t in part.values())

    def __repr__(self) -> str:
        count = sum(len(rows) for rows in self._rows.values())
        return f"Delta({count} rows of {len(self._rows)} tensors, {self.nbytes:,} bytes)"

    def apply(self, model: nn.Module) -> None:
        """Turns the parent into the child, in place.

        Raises:
            ValueError: if the model is not the parent, or already the child, or the delta is
                damaged, naming the tensor; nothing has changed then.
        """
        self._turn("apply", model, forward=True)

    def remove(self, model: nn.Module) -> None:
        """Turns the child into the parent, in place.

        Raises:
            ValueError: if the model is not the child, or the delta is damaged, naming the tensor;
                nothing has changed then.
        """
        self._turn("remove", model, forward=False)

    @torch.no_grad()
    def _turn(self, verb: str, model: nn.Module, *, forward: bool) -> None:
        tensors = self._fitting(verb, model)
        own = {name: self._own_rows(verb, name, tensor) for name, tensor in tensors.items()}
        self._check_side(verb, {name: _digest(rows) for name, rows in own.items()}, forward)
        turned = {name: rows ^ self._bits[name].to(rows.device) for name, rows in own.items()}
        for name, change in self._changes.items():
            if _digest(turned[name]) != (change.after if forward else change.before):
                raise ValueError(f"Delta.{verb}: the delta is damaged in its bits of {name}")
        try:
            for name, tensor in tensors.items():
                self._put(name, tensor, turned[name])
        except BaseException:
            for name, tensor in tensors.items():
                self._put(name, tensor, own[name])
            raise

    def _own_rows(self, verb: str, name: str, tensor: Tensor) -> Tensor:
        """The bytes of a tensor's rows, which must fit the delta's."""
        whole, rows = _row_bytes(tensor, self._changes[name].dim), self._rows[name]
        if bool(((rows < 0) | (rows >= len(whole))).any()) or (
            self._bits[name].shape[1:] != whole.shape[1:]
        ):
            raise ValueError(f"Delta.{verb}: the delta is damaged in its rows of {name}")
        return whole[rows.to(whole.device)]

    def _put(self, name: str, tensor: Tensor, raw: Tensor) -> None:
        dim, rows = self._changes[name].dim, self._rows[name].to(tensor.device)
        whole = tensor.view(1) if tensor.ndim == 0 else tensor
        shape = (len(rows), *whole.movedim(dim, 0).shape[1:])
        whole.index_copy_(dim, rows, raw.view(tensor.dtype).view(shape).movedim(0, dim))

    def _fitting(self, verb: str, model: nn.Module) -> dict[str, Tensor]:
        """The tensors to change, of a model of the right structure and dtypes."""
        if (found := fingerprint(model)) != self._structure:
            raise ValueError(
                f"Delta.{verb}: the delta belongs to another model: it was made for structure "
                f"{self._structure}, {type(model).__name__} has {found}"
            )
        own = saved_tensors(model)
        for name, change in self._changes.items():
            if str(own[name].dtype) != change.dtype:
                raise ValueError(
                    f"Delta.{verb}: {name} must be {change.dtype}, got {own[name].dtype}"
                )
        return {name: own[name] for name in self._changes}

    def _check_side(self, verb: str, found: Mapping[str, str], forward: bool) -> None:
        before = {name: change.before for name, change in self._changes.items()}
        after = {name: change.after for name, change in self._changes.items()}
        wanted, other = (before, after) if forward else (after, before)
        if found == wanted:
            return
        if found == other:
            state = "is applied already" if forward else "is not applied"
            raise ValueError(f"Delta.{verb}: the delta {state}")
        differ = [name for name in wanted if found[name] != wanted[name]]
        strange = next((name for name in differ if found[name] != other[name]), differ[0])
        raise ValueError(
            f"Delta.{verb}: the delta belongs to another model: its rows of {strange} have "
            f"digest {wanted[strange]}, here they have {found[strange]}"
        )

    # Files.

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON content of a file that holds the delta."""
        tensors = {f"rows/{name}": rows for name, rows in self._rows.items()}
        tensors |= {f"bits/{name}": bits for name, bits in self._bits.items()}
        changes = {name: asdict(change) for name, change in self._changes.items()}
        return tensors, {"fingerprint": self._structure, "changes": changes}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Delta:
        """The inverse of ``to_file``.

        Raises:
            KeyError, TypeError, ValueError: if the two are not of a delta.
        """
        changes = {name: _Change(**change) for name, change in content["changes"].items()}
        rows = {name: tensors[f"rows/{name}"] for name in changes}
        bits = {name: tensors[f"bits/{name}"] for name in changes}
        for name in changes:
            if bits[name].dtype != torch.uint8 or len(bits[name]) != len(rows[name]):
                raise ValueError(f"rows and bits of {name} do not fit each other")
        return cls(str(content["fingerprint"]), changes, rows, bits)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the delta to one file, atomically."""
        return _files.write(path, "delta", *self.to_file())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """
        return _files.read(path, "delta", cls.from_file)


def digest_of(model: nn.Module) -> str:
    """Hex digest of all that a model saves, names and bits."""
    digest = hashlib.sha256()
    for name, tensor in saved_tensors(model).items():
        digest.update(f"{name}:{tensor.dtype};{_digest(_row_bytes(tensor, 0))}".encode())
    return digest.hexdigest()[:32]


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a model saves, by name; a tensor with several names once, by its first."""
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (name, tensor.detach()))
    return dict(named.values())


def _row_bytes(tensor: Tensor, dim: int) -> Tensor:
    """All rows along ``dim`` as uint8 ``[C, bytes of a row]``; a scalar is one row."""
    first = tensor.reshape(1) if tensor.ndim == 0 else tensor.movedim(dim, 0)
    return first.reshape(len(first), -1).contiguous().view(torch.uint8)


def _digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()[:32]
