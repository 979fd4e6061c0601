"""How many parameters neurons have, and how many of a model a slice leaves in use.

A masked neuron is not read at its site, so the weights with which its readers read it do nothing.
Its producers' rows, biases and norm affine do nothing either, unless the neuron is coupled: what a
residual connection adds up is read at several sites, and masked at one of them only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from neusemslice.graph import Graph, Site, Span
from neusemslice.slicing.slice import Slice


def neuron_sizes(model: nn.Module, graph: Graph) -> dict[str, int]:
    """Per site, how many parameters do nothing once one of its neurons is masked."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {
        site.name: sum(
            span.repeat * shapes[span.tensor].numel() // shapes[span.tensor][span.dim]
            for span in _masked_with(graph, site)
            if span.tensor in shapes
        )
        for site in graph.sites
    }


def parameters_in_use(model: nn.Module, kept: Slice) -> int:
    """How many of the model's parameters do something while the slice is applied."""
    gone: dict[tuple[str, int], int] = defaultdict(int)
    for site in kept.graph.sites:
        neurons = site.neurons - int(kept.mask(site.name).sum())
        for span in _masked_with(kept.graph, site):
            gone[span.tensor, span.dim] += neurons * span.repeat
    return sum(
        math.prod(size - gone[name, dim] for dim, size in enumerate(parameter.shape))
        for name, parameter in model.named_parameters()
    )


def _masked_with(graph: Graph, site: Site) -> Iterator[Span]:
    if len(graph.groups[site.group].sites) == 1:
        yield from site.rows
    yield from site.columns
