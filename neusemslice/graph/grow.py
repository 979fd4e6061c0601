"""Growing: a copy of a cut model that has all neurons again, the inverse of cutting."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from neusemslice.graph.cut import lower
from neusemslice.graph.layers import is_transposed_linear
from neusemslice.graph.sites import Graph


def removed_indices(graph: Graph, masks: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Per tensor and dimension that a cut makes smaller, the indices that go, ascending int64."""
    found: dict[str, dict[int, list[Tensor]]] = {}
    for site in graph.sites:
        gone = (~masks[site.name]).nonzero().squeeze(1)
        if len(gone):
            for span in (*site.rows, *site.columns):
                found.setdefault(span.tensor, {}).setdefault(span.dim, []).append(
                    span.indices(gone)
                )
    return {
        name: {dim: torch.cat(parts).unique() for dim, parts in dims.items()}
        for name, dims in found.items()
    }


def grow(
    small: nn.Module, graph: Graph, masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of a cut model that has the graph's sizes again.

    Args:
        small: what ``cut`` left of a model with these masks; left as it was.
        graph: of the whole model.
        masks: per site a bool ``[C]``.
        tensors: by the names of the small model's tensors, what they become. At least those that
            were cut.
    """
    memo: dict[int, Any] = {}
    for named in (small.named_parameters, small.named_buffers):
        for name, own in named(remove_duplicate=False):
            if name in tensors:
                whole = tensors[name]
                is_parameter = isinstance(own, nn.Parameter)
                memo[id(own)] = nn.Parameter(whole, own.requires_grad) if is_parameter else whole
    result = copy.deepcopy(small, memo)
    for layer in graph.layers:
        module: Any = result.get_submodule(layer.name)
        if is_transposed_linear(small.get_submodule(layer.name)):
            module.nx, module.nf = layer.inputs, layer.outputs
        elif isinstance(module, _ConvNd):
            module.in_channels, module.out_channels = layer.inputs, layer.outputs
            if layer.depthwise:
                module.groups = layer.outputs
        else:
            module.in_features, module.out_features = layer.inputs, layer.outputs
    for site in graph.sites:
        gone = int((~masks[site.name]).sum())
        for count in site.counts:
            lower(result.get_submodule(count.module), count.name, -count.per_neuron * gone)
    return result
