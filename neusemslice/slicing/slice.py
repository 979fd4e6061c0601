"""A slice: a set of neurons over all sites of a model, as a value."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neusemslice import _files
from neusemslice.graph import Graph, fingerprint, misfit
from neusemslice.ops import bitset_pack, bitset_unpack
from neusemslice.slicing.masking import in_units, masked


class SiteShare(NamedTuple):
    """How much of a site is in a slice."""

    site: str
    neurons: int
    kept: int

    @property
    def density(self) -> float:
        return self.kept / max(1, self.neurons)


class Slice:
    """A set of neurons over the sites of one model, with set algebra ``| & - ^ ~``.

    Immutable; equal sets of the same model are equal and hash alike. The neurons are kept as one
    packed bitset per site.

    Args:
        graph: the model's sites.
        masks: per site a bool ``[C]``; a site left out has no neuron in the slice.

    Raises:
        ValueError: for a site that the graph does not have, or a mask of another size.
        TypeError: for a mask that is not bool.
    """

    def __init__(self, graph: Graph, masks: Mapping[str, Tensor]) -> None:
        sizes = {site.name: site.neurons for site in graph.sites}
        if unknown := sorted(set(masks) - set(sizes)):
            raise ValueError(f"Slice: the model has no site {unknown[0]!r}, only {list(sizes)}")
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"Slice: the mask of site {name} must be bool, got {mask.dtype}")
            if mask.shape != (sizes[name],):
                raise ValueError(
                    f"Slice: the mask of site {name} must have shape [{sizes[name]}], "
                    f"got {list(mask.shape)}"
                )
        empty = torch.zeros(0, dtype=torch.bool)
        self.graph = graph
        self._words = {
            name: bitset_pack(masks.get(name, empty.new_zeros(size)).cpu())
            for name, size in sizes.items()
        }

    @classmethod
    def whole(cls, graph: Graph) -> Slice:
        """All neurons."""
        return cls(graph, {s.name: torch.ones(s.neurons, dtype=torch.bool) for s in graph.sites})

    # The set as data.

    def mask(self, site: str) -> Tensor:
        """bool ``[C]``: which neurons of a site are in the slice."""
        return bitset_unpack(self._words[site], self.graph.site(site).neurons)

    def masks(self) -> dict[str, Tensor]:
        """The masks of all sites."""
        return {site.name: self.mask(site.name) for site in self.graph.sites}

    def __len__(self) -> int:
        """Number of neurons."""
        return sum(int(mask.sum()) for mask in self.masks().values())

    @property
    def density(self) -> float:
        """Share of the model's neurons that are in the slice."""
        return len(self) / max(1, self.graph.neurons)

    def table(self) -> list[SiteShare]:
        """How much of each site is in the slice, in the order of the forward pass."""
        return [
            SiteShare(site.name, site.neurons, int(self.mask(site.name).sum()))
            for site in self.graph.sites
        ]

    def jaccard(self, other: Slice) -> float:
        """``|self ∩ other| / |self ∪ other|``; 0 if both are empty, as in ``bitset_similarity``.

        Raises:
            ValueError: if the two are of different models.
        """
        return len(self & other) / max(1, len(self | other))

    @property
    def digest(self) -> str:
        """Hex digest of the set and its model's structure; the same in every process."""
        digest = hashlib.sha256(self.graph.fingerprint.encode())
        for name, words in sorted(self._words.items()):
            digest.update(name.encode() + words.numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:32]

    def __repr__(self) -> str:
        return f"Slice({len(self)} of {self.graph.neurons} neurons, {self.digest[:8]})"

    # Set algebra.

    def _combine(self, other: Slice, how: Callable[[Tensor, Tensor], Tensor]) -> Slice:
        if other.graph.fingerprint != self.graph.fingerprint:
            raise ValueError(
                f"Slice: the two slices are of different models "
                f"({self.graph.fingerprint} and {other.graph.fingerprint})"
            )
        if self._words.keys() != other._words.keys():
            raise ValueError(
                f"Slice: the two slices have different sites "
                f"({list(self._words)} and {list(other._words)})"
            )
        return Slice(
            self.graph, {name: how(mask, other.mask(name)) for name, mask in self.masks().items()}
        )

    def __or__(self, other: Slice) -> Slice:
        return self._combine(other, torch.logical_or)

    def __and__(self, other: Slice) -> Slice:
        return self._combine(other, torch.logical_and)

    def __sub__(self, other: Slice) -> Slice:
        return self._combine(other, lambda a, b: a & ~b)

    def __xor__(self, other: Slice) -> Slice:
        return self._combine(other, torch.logical_xor)

    def __invert__(self) -> Slice:
        return Slice(self.graph, {name: ~mask for name, mask in self.masks().items()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slice) and self.digest == other.digest

    def __hash__(self) -> int:
        # Python's own hash of a text is another one in each process.
        return int(self.digest[:15], 16)

    def closed(self) -> Slice:
        """The smallest slice around this one in which neurons that go together are together.

        A neuron of a coupled group is kept if any site of the group keeps it, and a group of a
        GroupNorm if any of its neurons is kept.
        """
        masks = self.masks()
        size = -1
        while size != (size := sum(int(mask.sum()) for mask in masks.values())):
            for group in self.graph.groups:
                sizes = {masks[name].shape for name in group.sites}
                if len(group.sites) == 1 or len(sizes) > 1:
                    continue
                together = torch.stack([masks[name] for name in group.sites]).any(0)
                masks.update(dict.fromkeys(group.sites, together))
            masks = in_units(self.graph, masks)
        return Slice(self.graph, masks)

    # The set and its model.

    def check_model(self, model: nn.Module) -> None:
        """Refuses a model of another structure than the slice's.

        Raises:
            ValueError: naming both fingerprints, and the first site that differs.
        """
        found = fingerprint(model)
        if found != self.graph.fingerprint:
            where = misfit(self.graph, model) or "its sites fit, other tensors do not"
            raise ValueError(
                f"the slice belongs to another model: it was made for structure "
                f"{self.graph.fingerprint}, {type(model).__name__} has {found}; {where}"
            )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block every neuron outside the slice is 0 for whoever reads it.

        Neurons are set to 0 at their readers' inputs by selection, so a NaN in one of them does
        not get through; where a norm mixes neurons, also before it, so that the others' scale does
        not tell of them, and after it. A group of a GroupNorm is masked as a whole, once none of
        its neurons is in the slice: until then the others need its mean and scale.

        The model's tensors are not touched. Inside a block within this one, of the same model, the
        intersection of the slices is what stays. Compiled code would ignore that hooks came or
        went, so the compiler is reset on entering and leaving.

        Raises:
            ValueError: if the model has another structure.
        """
        self.check_model(model)
        with self.masking(model):
            yield

    @contextmanager
    def masking(self, model: nn.Module) -> Iterator[None]:
        """``applied`` for a model that is known to fit."""
        with masked(model, self.graph, self.masks()):
            yield

    def parameters(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for ``optim.MaskedSGD`` and ``MaskedAdamW`` that tune this slice only.

        Each neuron brings its producers' rows and biases and the affine parameters of the norms
        that belong to it.

        Raises:
            ValueError: if the model has another structure, or the slice is empty.
        """
        self.check_model(model)
        own = dict(model.named_parameters(remove_duplicate=False))
        chosen: dict[int, tuple[nn.Parameter, int, list[Tensor]]] = {}
        for site in self.graph.sites:
            neurons = self.mask(site.name).nonzero().squeeze(1)
            for span in site.rows:
                parameter = own.get(span.tensor)
                if parameter is None or not len(neurons):
                    continue  # a running statistic, or nothing of this site
                entry = chosen.setdefault(id(parameter), (parameter, span.dim, []))
                entry[2].append(span.indices(neurons))
        if not chosen:
            raise ValueError("Slice.parameters: the slice is empty, there is no parameter to tune")
        return [
            {
                "params": [p for p, _, _ in chosen.values()],
                "neuron_dims": [dim for _, dim, _ in chosen.values()],
                "rows": [torch.cat(r).unique().to(p.device) for p, _, r in chosen.values()],
            }
        ]

    # Files.

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON content of a file that holds the slice."""
        return dict(self._words), {"graph": self.graph.to_json()}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Slice:
        """The inverse of ``to_file``.

        Raises:
            KeyError, TypeError, ValueError: if the two are not of a slice.
        """
        graph = Graph.from_json(content["graph"])
        return cls(graph, {s.name: bitset_unpack(tensors[s.name], s.neurons) for s in graph.sites})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the slice to one file, atomically."""
        return _files.write(path, "slice", *self.to_file())

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> Slice:
        """Reads what ``save`` wrote.

        Args:
            path: the file.
            model: the model that it is for; refused here if the slice is of another one.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """
        found = _files.read(path, "slice", cls.from_file)
        if model is not None:
            try:
                found.check_model(model)
            except ValueError as error:
                raise ValueError(f"{Path(path)}: {error}") from error
        return found
