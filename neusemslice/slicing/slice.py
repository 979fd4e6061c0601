"""A slice: a set of neurons over all sites of a model, as a value."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice import _files
from neusemslice.graph import Graph, fingerprint, reset_compiler
from neusemslice.ops import bitset_pack, bitset_unpack


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
        return hash(self.digest)

    def closed(self) -> Slice:
        """The smallest slice around this one in which coupled neurons are together.

        A neuron of a coupled group is kept if any site of the group keeps it.
        """
        masks = self.masks()
        for group in self.graph.groups:
            sizes = {masks[name].shape for name in group.sites}
            if len(group.sites) == 1 or len(sizes) > 1:
                continue
            together = torch.stack([masks[name] for name in group.sites]).any(0)
            masks.update(dict.fromkeys(group.sites, together))
        return Slice(self.graph, masks)

    # The set and its model.

    def check_model(self, model: nn.Module) -> None:
        """Refuses a model of another structure than the slice's.

        Raises:
            ValueError: naming both fingerprints.
        """
        found = fingerprint(model)
        if found != self.graph.fingerprint:
            raise ValueError(
                f"the slice belongs to another model: it was made for structure "
                f"{self.graph.fingerprint}, {type(model).__name__} has {found}"
            )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block every neuron outside the slice is 0 for whoever reads it.

        Neurons are set to 0 at their readers' inputs by selection, so a NaN in one of them does
        not get through. The model's tensors are not touched. If the model or a part of it is
        compiled, the compiler is reset on entering and leaving, because it would ignore the hooks.

        Raises:
            ValueError: if the model has another structure.
        """
        self.check_model(model)
        with self.masking(model):
            yield

    @contextmanager
    def masking(self, model: nn.Module) -> Iterator[None]:
        """``applied`` for a model that is known to fit."""
        handles = []
        reset_compiler()
        try:
            for module, (dim, keep) in self._kept_features(model).items():
                hook = _select_hook(dim, keep)
                handles.append(
                    model.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)
                )
            yield
        finally:
            for handle in handles:
                handle.remove()
            reset_compiler()

    def _kept_features(self, model: nn.Module) -> dict[str, tuple[int, Tensor]]:
        """For each reader of a neuron outside the slice: features to keep, and their dimension."""
        sizes = {layer.name: layer.inputs for layer in self.graph.layers}
        kept: dict[str, tuple[int, Tensor]] = {}
        for site in self.graph.sites:
            mask = self.mask(site.name)
            for reader in site.readers:
                blank = torch.ones(sizes[reader.module], dtype=torch.bool)
                _, features = kept.setdefault(reader.module, (reader.dim, blank))
                span = slice(reader.start, reader.start + site.neurons * reader.repeat)
                features[span] &= mask.repeat_interleave(reader.repeat)
        return {
            name: (dim, features.to(next(model.get_submodule(name).parameters()).device))
            for name, (dim, features) in kept.items()
            if not bool(features.all())
        }

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

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the slice to one file, atomically."""
        return _files.write(path, "slice", self._words, {"graph": self.graph.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Slice:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """

        def build(tensors: dict[str, Tensor], content: dict[str, Any]) -> Slice:
            graph = Graph.from_json(content["graph"])
            return cls(
                graph, {s.name: bitset_unpack(tensors[s.name], s.neurons) for s in graph.sites}
            )

        return _files.read(path, "slice", build)


def _select_hook(
    dim: int, keep: Tensor
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs["input"]
        shape = [1] * x.ndim
        shape[dim] = -1
        selected = torch.where(keep.view(shape), x, x.new_zeros(()))
        return ((selected, *args[1:]), kwargs) if args else (args, {**kwargs, "input": selected})

    return hook
