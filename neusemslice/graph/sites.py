"""What a graph says of a model: sites, the tensors their neurons own, and coupled groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Where a site's neurons lie along one dimension of a parameter or buffer.

    Neuron ``c`` owns the indices ``start + c * repeat … start + (c + 1) * repeat - 1`` of
    dimension ``dim`` of ``tensor`` (its name in the model's state dict). ``repeat`` is above 1
    where an image was flattened, so that a neuron has one feature per pixel, and for an attention
    head, which has several features.
    """

    tensor: str
    dim: int
    start: int = 0
    repeat: int = 1

    def indices(self, neurons: Tensor) -> Tensor:
        """Indices along ``dim`` of the given neurons, int64, ascending if the neurons are."""
        within = torch.arange(self.repeat, device=neurons.device)
        return (self.start + neurons.unsqueeze(1) * self.repeat + within).flatten()


@dataclass(frozen=True)
class Reader:
    """A module whose input carries a site's neurons, from feature ``start`` on.

    Neuron ``c`` has the features ``start + c * repeat …`` of dimension ``dim`` of the input (1 for
    convolutions, -1 for linear layers). With ``pieces`` a sample is several rows of the input,
    next to each other: the windows of an image, or tokens laid end to end. A ``routed`` module
    holds fused experts; its input is taken to be their weights for each token (experts.py).
    """

    module: str
    dim: int
    start: int = 0
    repeat: int = 1
    pieces: bool = False
    routed: bool = False

    def take(self, x: Tensor, neurons: int) -> Tensor:
        """The site's part of the module's input ``x``, with the neurons in ``neuron_dim``.

        Where a neuron has several features, these get a dimension of their own behind the others:
        ``[N, T, C * repeat]`` becomes ``[N, C, T, repeat]``.
        """
        part = x.narrow(self.dim, self.start, neurons * self.repeat)
        if self.repeat > 1:
            at = self.dim % x.ndim
            part = part.unflatten(at, (neurons, self.repeat)).movedim(at, 1)
        return part

    @property
    def neuron_dim(self) -> int:
        """Where the neurons are in what ``take`` returns."""
        return 1 if self.repeat > 1 else self.dim


@dataclass(frozen=True)
class Count:
    """A number in a module that says how many of a site's neurons, or of their parts, there are.

    With each neuron that goes, the attribute ``name`` of ``module`` falls by ``per_neuron``. A name
    with a dot is that of a number in an object which modules may share, like a configuration.
    """

    module: str
    name: str
    per_neuron: int


@dataclass(frozen=True)
class Site:
    """A group of neurons that is observed at one place.

    Attributes:
        name: of the first producer.
        neurons: how many, ``C``.
        group: index of its coupled group in ``Graph.groups``.
        producers: the modules whose outputs the neurons are; of attention heads the source of
            values, then those of queries and keys, or the one layer that gives them all.
        readers: the modules that read them; the first is where they are observed, at its input.
        norms: the norms in ``Graph.norms`` that read them on their way there.
        rows: what the neurons own: producers' rows, biases, norm affine and running statistics.
        columns: the weights with which the readers read them.
        counts: how many there are of them, where no shape of a layer's weight tells.
    """

    name: str
    neurons: int
    group: int
    producers: tuple[str, ...]
    readers: tuple[Reader, ...]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    norms: tuple[Reader, ...] = ()
    counts: tuple[Count, ...] = ()


@dataclass(frozen=True)
class Norm:
    """A norm module in which each of several features depends on the others.

    Attributes:
        name: of the module.
        dim: of its input and output that holds the features.
        features: how many.
        units: into how many runs of features it divides them, each of which stays or goes as a
            whole: the groups of a GroupNorm. Equal to ``features`` where each may go alone.
    """

    name: str
    dim: int
    features: int
    units: int


@dataclass(frozen=True)
class Group:
    """Sites whose neurons are kept or removed together, neuron by neuron.

    ``kept_whole`` says why none of its neurons may be removed; it is empty where they may. At least
    ``least`` of them must stay: the number of experts that a token has.
    """

    sites: tuple[str, ...]
    kept_whole: str = ""
    least: int = 1


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    Attributes:
        name: of the module.
        inputs, outputs: neurons on either side.
        macs: multiply-adds of one sample.
        depthwise: whether each neuron reads only its own predecessor.
    """

    name: str
    inputs: int
    outputs: int
    macs: int
    depthwise: bool


@dataclass(frozen=True)
class Graph:
    """The sites of a model, in the order in which a forward pass meets them.

    Attributes:
        fingerprint: of the model's structure (names and shapes of its tensors).
        num_outputs: size of the last dimension of the model's output.
        sites, groups: see ``Site`` and ``Group``.
        layers: all convolutions and linear layers that a forward pass calls.
        outputs: modules whose neurons are the model's answer.
        norms: those that mix the neurons of sites, in the order of their calls.
        skipped: modules that are not observed, and why.
        expert_macs: multiply-adds of one sample in fused experts. Each token has as many experts,
            however many there are to choose from.
    """

    fingerprint: str
    num_outputs: int
    sites: tuple[Site, ...]
    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    outputs: tuple[str, ...]
    skipped: Mapping[str, str]
    norms: tuple[Norm, ...] = ()
    expert_macs: int = 0

    def site(self, name: str) -> Site:
        """The site of that name.

        Raises:
            KeyError: naming it and the known ones.
        """
        for site in self.sites:
            if site.name == name:
                return site
        known = ", ".join(site.name for site in self.sites)
        raise KeyError(f"no site {name!r}; the model has {known}")

    def only(self, names: Collection[str]) -> Graph:
        """The graph with these sites alone; a group that loses a site is kept whole."""
        groups: list[Group] = []
        number: dict[int, int] = {}
        for index, group in enumerate(self.groups):
            left = tuple(name for name in group.sites if name in names)
            if left:
                number[index] = len(groups)
                partly = "some of its sites are not observed" if left != group.sites else ""
                groups.append(Group(left, group.kept_whole or partly, group.least))
        sites = tuple(
            replace(site, group=number[site.group]) for site in self.sites if site.name in names
        )
        return replace(self, sites=sites, groups=tuple(groups))

    @property
    def neurons(self) -> int:
        """Neurons of all sites."""
        return sum(site.neurons for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        """As plain lists and dicts, for a file's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Graph:
        """The inverse of ``to_json``."""
        return cls(
            fingerprint=str(raw["fingerprint"]),
            num_outputs=int(raw["num_outputs"]),
            sites=tuple(
                Site(
                    name=site["name"],
                    neurons=int(site["neurons"]),
                    group=int(site["group"]),
                    producers=tuple(site["producers"]),
                    readers=tuple(Reader(**reader) for reader in site["readers"]),
                    rows=tuple(Span(**span) for span in site["rows"]),
                    columns=tuple(Span(**span) for span in site["columns"]),
                    norms=tuple(Reader(**norm) for norm in site["norms"]),
                    counts=tuple(Count(**count) for count in site["counts"]),
                )
                for site in raw["sites"]
            ),
            groups=tuple(
                Group(tuple(g["sites"]), g["kept_whole"], g["least"]) for g in raw["groups"]
            ),
            layers=tuple(Layer(**layer) for layer in raw["layers"]),
            outputs=tuple(raw["outputs"]),
            skipped=dict(raw["skipped"]),
            norms=tuple(Norm(**norm) for norm in raw["norms"]),
            expert_macs=int(raw["expert_macs"]),
        )
