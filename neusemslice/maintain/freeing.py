"""Which neurons a task keeps and which are free, and what a free neuron brings to be trained.

A group of neurons can be freed where it can be cut out, so that nothing of it reaches the rest, and
where one layer's input is all that it is read at: inner channels of a block, the intermediate
features of an MLP, attention heads. Groups that are read in several places are residual streams:
they stay whole, because their neurons are sums to which every block contributes. So do experts,
whose shares of a token depend on each other, and convolutions that read an image: what they find is
general (Yosinski et al., How transferable are features in deep neural networks?, 2014), and their
weights are few, so every task reads all of it.

Of the old classes' neurons those go first that the others make up for, where there are samples to
tell (``maintain/redundancy.py``). Accuracy in percent of LeNet-5, which has six neurons in its
first layer, on images of MNIST that it was not trained on; mean over tasks and over three seeds,
which differ by up to 0.3 points from it:

=======================================  =======  =======
first layer; what goes first             5 and 5  5 times 2
=======================================  =======  =======
divided; the least important             98.63    98.90
divided; what the others make up for     98.71    98.63
whole; the least important               98.69    99.16
whole; what the others make up for       98.80    98.99
=======================================  =======  =======

Every group frees the same share of its neurons. Where instead all keep the same share of their
contribution, as ``restructure`` without compensation does, wide layers free more and narrow ones
less; with two tasks of CIFAR-10 the mean of old and new classes then ends at 87.0 % of the test
images and not at 87.1 (ResNet-20, 35 % free, three seeds, each within 0.2 points).

Free neurons start afresh unless they are told not to: five tasks of MNIST then end at 99.1 % of the
test images, and at 98.3 % if neurons start from the weights that they have. With two tasks of
CIFAR-10 it is the other way round: the new classes end at 88.5 % afresh, and at 89.2 % from the
weights that are there (ResNet-20, 35 % of the inner channels free, validation images, one seed).

A free neuron brings its own rows and, in layers that have no free row, the columns with which it is
read. Under earlier tasks these columns meet zeros.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.graph import Graph, Group, Site, weight_dims
from neusemslice.maintain.targets import ordered
from neusemslice.maintain.tasks import batch_norms
from neusemslice.slicing import SemanticSlicing, Slice

_CHANNELS = 4
"""An image has at most so many."""


def separable(graph: Graph) -> list[Group]:
    """The groups whose neurons can be freed one by one."""
    first = _reading_images(graph)
    return [
        group
        for group in graph.groups
        if not group.kept_whole
        and group.least == 1
        and sum(bool(graph.site(name).columns) for name in group.sites) == 1
        and not any(first.intersection(graph.site(name).producers) for name in group.sites)
    ]


def _reading_images(graph: Graph) -> set[str]:
    """The convolutions that read no neuron but an image's channels."""
    read = {span.tensor for site in graph.sites for span in site.columns}
    return {
        layer.name
        for layer in graph.layers
        if f"{layer.name}.weight" not in read
        and layer.inputs <= _CHANNELS
        and layer.macs > layer.inputs * layer.outputs
    }


def needed(
    model: nn.Module,
    slicing: SemanticSlicing,
    capacity: float | None,
    old: Iterable[Any] | None,
    caller: str,
) -> Slice:
    """What the classes of a slicing keep: of separable groups some neurons, all other sites whole.

    Args:
        model: that the slicing was made from.
        capacity: share of each group's neurons that is free; ``None`` keeps the critical ones.
        old: samples to tell with which neurons others make up for; without, the least important
            ones are free.
        caller: named in errors.
    """
    graph = slicing.profile.graph
    critical = slicing.critical_slice()
    masks = Slice.whole(graph).masks()
    orders = ordered(model, slicing, None if capacity is None else old, caller)
    divided = separable(graph)
    for group, order in zip(graph.groups, orders, strict=True):
        if group not in divided:
            continue
        kept = torch.zeros(len(order), dtype=torch.bool)
        if capacity is not None:
            kept[order[: math.ceil((1 - capacity) * len(order))]] = True
        else:
            kept |= torch.stack([critical.mask(name) for name in group.sites]).any(0)
        kept[order[0]] = True
        masks.update(dict.fromkeys(group.sites, kept))
    return Slice(graph, masks).closed()


def part_of(free: Slice, share: float) -> Slice:
    """The first free neurons of each group, this share of them, rounded up."""
    masks = {}
    for group in separable(free.graph):
        mask = free.mask(group.sites[0])
        count = math.ceil(share * int(mask.sum()))
        masks.update(dict.fromkeys(group.sites, mask & (mask.cumsum(0) <= count)))
    return Slice(free.graph, masks)


def trained(backbone: nn.Module, own: Slice) -> list[dict[str, Any]]:
    """Parameter groups of a task's own neurons, without batch norms: rows, and columns."""
    apart = {id(p) for norm in batch_norms(backbone).values() for p in norm.parameters()}
    groups = []
    for group in own.parameters(backbone):
        some = [i for i, p in enumerate(group["params"]) if id(p) not in apart]
        groups.append({key: [values[i] for i in some] for key, values in group.items()})
    with_rows = {id(parameter) for group in groups for parameter in group["params"]}
    columns = {
        place: found
        for place, found in _columns(backbone, own).items()
        if id(backbone.get_parameter(place[0])) not in with_rows
    }
    if columns:
        groups.append(
            {
                "params": [backbone.get_parameter(name) for name, _ in columns],
                "neuron_dims": [dim for _, dim in columns],
                "rows": list(columns.values()),
            }
        )
    return groups


@torch.no_grad()
def start_afresh(backbone: nn.Module, own: Slice) -> None:
    """Gives neurons new rows, as their layers first had them, and has no other neuron read them.

    Rows of a layer are drawn together with those of all its neurons, as on its creation.
    """
    rows: dict[str, tuple[int, list[Tensor]]] = {}
    for site in own.graph.sites:
        neurons = own.mask(site.name).nonzero().squeeze(1)
        for span in site.rows if len(neurons) else ():
            rows.setdefault(span.tensor, (span.dim, []))[1].append(span.indices(neurons))
    tensors = backbone.state_dict()
    made: dict[str, dict[str, Tensor]] = {}
    for name, (dim, parts) in rows.items():
        owner, _, tensor = name.rpartition(".")
        if owner not in made:
            made[owner] = _fresh(backbone.get_submodule(owner)).state_dict()
        chosen = torch.cat(parts).to(tensors[name].device)
        tensors[name].index_copy_(dim, chosen, made[owner][tensor].index_select(dim, chosen))
    for (name, dim), columns in _columns(backbone, own).items():
        weight = tensors[name]
        other = torch.ones(weight.shape[1 - dim], dtype=torch.bool, device=weight.device)
        for part in rows[name][1] if name in rows else ():
            other[part.to(weight.device)] = False
        readers = other.nonzero().squeeze(1)
        unread = weight.index_select(1 - dim, readers).index_fill(dim, columns, 0)
        weight.index_copy_(1 - dim, readers, unread)


def _columns(backbone: nn.Module, own: Slice) -> dict[tuple[str, int], Tensor]:
    """By weight and dimension, the columns with which neurons are read, but for the head's."""
    heads = {f"{name}.weight" for name in own.graph.outputs}
    found: dict[tuple[str, int], list[Tensor]] = {}
    for site in own.graph.sites:
        neurons = own.mask(site.name).nonzero().squeeze(1)
        for span in site.columns:
            if len(neurons) and span.tensor not in heads:
                found.setdefault((span.tensor, span.dim), []).append(span.indices(neurons))
    return {
        place: torch.cat(parts).unique().to(backbone.get_parameter(place[0]).device)
        for place, parts in found.items()
    }


def _fresh(module: nn.Module) -> nn.Module:
    """A copy as it was first initialised."""
    fresh = copy.deepcopy(module)
    reset = getattr(fresh, "reset_parameters", None)
    if callable(reset):
        reset()
    elif isinstance(weight := getattr(fresh, "weight", None), Tensor) and weight.ndim > 1:
        # As torch's own layers.
        bound = (weight.numel() / weight.shape[weight_dims(fresh)[0]]) ** -0.5
        nn.init.uniform_(weight, -bound, bound)
        if isinstance(bias := getattr(fresh, "bias", None), Tensor):
            nn.init.zeros_(bias)
    return fresh


def per_site(chosen: Slice) -> dict[str, tuple[int, int]]:
    """Per site whose group can be freed: neurons, and how many of them are in the slice."""
    sites: list[Site] = [
        chosen.graph.site(name) for group in separable(chosen.graph) for name in group.sites
    ]
    return {site.name: (site.neurons, int(chosen.mask(site.name).sum())) for site in sites}
