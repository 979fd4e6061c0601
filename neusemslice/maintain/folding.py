"""Where the neurons are read that compensation folds into others, and how they vary together there.

Activations are taken where compensation fits: as the group's readers read them, behind norms and
activation functions, a row for each position, and for each real token of a text. That is no more
work than the Gram with which each of these readers is fitted. One sweep streams the Grams of all
groups; of wide models several sweeps do, each for as many groups as have ``TOGETHER`` bytes of
them: ``8 F²`` of ``F`` features, 1.6 GB of 14,336.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from neusemslice._progress import track
from neusemslice.graph import Graph, Inputs, Reader, Site, device_of
from neusemslice.maintain.capture import real_tokens
from neusemslice.maintain.compensate import fittable
from neusemslice.ops import Gram, gram_
from neusemslice.profiling import unlabelled

TOGETHER = 2**32
"""Bytes of Grams that are streamed in one sweep."""


@dataclass(frozen=True)
class Place:
    """Where a site is read: ``neurons`` of them with ``each`` so many features and positions.

    A head has several features. The pixels of an image that was flattened are positions.
    """

    neurons: int
    each: int
    reader: Reader

    @classmethod
    def of(cls, site: Site, reader: Reader) -> Place:
        single = any(span.repeat == 1 for span in site.rows)
        return cls(site.neurons, 1 if single else reader.repeat, reader)

    @property
    def features(self) -> int:
        return self.neurons * self.each

    def rows(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """The site's part of what the reader reads, ``[R, features]``, of the rows to keep."""
        width = self.neurons * self.reader.repeat
        part: Tensor = x.narrow(self.reader.dim, self.reader.start, width).movedim(
            self.reader.dim, -1
        )
        part = part.flatten(0, -2)
        part = part if keep is None else part[keep]
        # A neuron has its positions next to each other, or its features.
        part = part.unflatten(-1, (self.neurons, -1, self.each)).movedim(2, 1)
        return part.reshape(-1, self.features)

    def written(self, x: Tensor, rows: Tensor) -> Tensor:
        """A copy of what the reader reads with other rows at the site's part, of all positions."""
        width = self.neurons * self.reader.repeat
        copy = x.clone()
        part = copy.narrow(self.reader.dim, self.reader.start, width).movedim(self.reader.dim, -1)
        positions = width // self.features
        rows = rows.view(-1, positions, self.neurons, self.each).movedim(1, 2)
        part.copy_(rows.reshape(part.shape))
        return copy


def foldable(
    model: nn.Module, graph: Graph, loader: Iterable[Any], caller: str
) -> dict[int, list[list[Place]]]:
    """Where the sites of the groups are read whose neurons compensation folds, by their number.

    Of each site the readers that are fitted, in the order of the forward pass.
    """
    fitted = set(fittable(model, graph, loader, caller))
    found = {}
    for index, group in enumerate(graph.groups):
        sites = [graph.site(name) for name in group.sites]
        folding = {span.tensor.rpartition(".")[0] for site in sites for span in site.columns}
        if not group.kept_whole and folding and folding <= fitted:
            reading = [[r for r in site.readers if r.module in folding] for site in sites]
            found[index] = [
                [Place.of(site, reader) for reader in readers]
                for site, readers in zip(sites, reading, strict=True)
                if readers
            ]
    return found


def sweeps(groups: dict[int, list[Place]]) -> Iterator[dict[int, list[Place]]]:
    """The groups whose Grams are streamed together."""
    some: dict[int, list[Place]] = {}
    used = 0
    for index, places in groups.items():
        size = sum(8 * place.features**2 for place in places)
        if some and used + size > TOGETHER:
            yield some
            some, used = {}, 0
        some[index] = places
        used += size
    if some:
        yield some


def grams_of(
    model: nn.Module, places: Iterable[Place], loader: Iterable[Any], caller: str
) -> dict[Place, Gram]:
    """The Gram of what is read at each place.

    Raises:
        ValueError: naming the layer that reads activations that are not finite.
    """
    grams: dict[Place, Gram] = {}
    current = Inputs()

    def reads(place: Place) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            rows = place.rows(x, real_tokens(current, x))
            if place not in grams:
                grams[place] = Gram.empty(place.features, rows.device)
            gram_(grams[place], rows)

        return hook

    handles = [
        model.get_submodule(place.reader.module).register_forward_pre_hook(
            reads(place), with_kwargs=True
        )
        for place in dict.fromkeys(places)
    ]
    try:
        for inputs in track(unlabelled(loader, caller), f"{caller}: correlations"):
            current = inputs.to(device_of(model))
            current.run(model)
    finally:
        for handle in handles:
            handle.remove()
    for place, gram in grams.items():
        if not bool(gram.products.isfinite().all()):
            raise ValueError(
                f"{caller}: layer {place.reader.module} sees activations that are not finite"
            )
    return grams
