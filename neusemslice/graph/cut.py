"""Cutting: a copy of a model that has some of its neurons only.

The graph says of each site which indices of which tensors its neurons own, and which numbers in
modules count them. So a cut is one selection per tensor and dimension, from the original into the
copy: what goes is never copied, and how long it takes does not depend on the number of neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from neusemslice.graph.layers import is_depthwise, is_layer, is_transposed_linear, weight_dims
from neusemslice.graph.sites import Graph


def cut(model: nn.Module, graph: Graph, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model without the neurons outside the masks; it is no smaller than that.

    Nothing is checked: neurons that are coupled must stay or go together, and those of groups that
    are kept whole must stay.

    Args:
        model: left as it was. Its sites must be the graph's.
        masks: per site a bool ``[C]``; a site left out keeps all.
    """
    tensors = tensors_of(model)
    # Deep copies take what the memo has for an object instead of copying it, so every module that
    # has the same tensor also has the same smaller one.
    memo: dict[int, Any] = {}
    touched: set[str] = set()
    for name, dims in left_in(graph, masks, tensors).items():
        whole = tensors[name]
        part = memo.get(id(whole), whole).detach()
        for dim, left in dims.items():
            part = part.index_select(dim, left.nonzero().squeeze(1).to(part.device))
        if isinstance(whole, nn.Parameter):
            part = nn.Parameter(part, whole.requires_grad)
        memo[id(whole)] = part
        touched.add(name.rpartition(".")[0])
    result = copy.deepcopy(model, memo)
    for name in touched:
        if is_layer(whole_layer := model.get_submodule(name)):
            _fit(result.get_submodule(name), whole_layer)
    for module_name, attribute, less in fewer_in(graph, masks):
        lower(result.get_submodule(module_name), attribute, less)
    return result


def lower(module: nn.Module, name: str, less: int) -> None:
    """Takes ``less`` from a number that counts neurons, in this module and in no other."""
    shared, _, inner = name.rpartition(".")
    owner: Any = module
    if shared:
        owner = copy.copy(getattr(module, shared))
        setattr(module, shared, owner)
    setattr(owner, inner, getattr(owner, inner) - less)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; those that modules share by each of their names."""
    return {
        name: tensor
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }


def left_in(
    graph: Graph, masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, dict[int, Tensor]]:
    """Per tensor and dimension that loses indices, which are left, bool."""
    left: dict[str, dict[int, Tensor]] = {}
    for site in graph.sites:
        mask = masks.get(site.name)
        if mask is None or bool(mask.all()):
            continue
        gone = (~mask).nonzero().squeeze(1)
        for span in (*site.rows, *site.columns):
            dims = left.setdefault(span.tensor, {})
            if span.dim not in dims:
                size = tensors[span.tensor].shape[span.dim]
                dims[span.dim] = torch.ones(size, dtype=torch.bool)
            dims[span.dim][span.indices(gone.cpu())] = False
    return left


def fewer_in(graph: Graph, masks: Mapping[str, Tensor]) -> Iterator[tuple[str, str, int]]:
    """Modules, their numbers that count neurons, and by how much each falls."""
    for site in graph.sites:
        if site.name in masks and (gone := int((~masks[site.name]).sum())):
            for count in site.counts:
                yield count.module, count.name, count.per_neuron * gone


def _fit(layer: Any, whole: nn.Module) -> None:
    """Has a layer's sizes be those of its weight, which in the whole model lies as in ``whole``."""
    outputs, inputs = (layer.weight.shape[dim] for dim in weight_dims(whole))
    if is_transposed_linear(whole):
        layer.nx, layer.nf = inputs, outputs
    elif not isinstance(whole, _ConvNd):
        layer.in_features, layer.out_features = inputs, outputs
    elif is_depthwise(whole):
        layer.in_channels = layer.out_channels = layer.groups = outputs
    else:
        layer.in_channels, layer.out_channels = inputs, outputs
