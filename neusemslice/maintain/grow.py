"""Growing: layers made wider by neurons that nobody reads yet.

As in Net2Net (Chen et al., Net2Net: Accelerating Learning via Knowledge Transfer, 2016) the model
goes on computing what it did: new neurons have rows as a new layer has them, and zeros where they
are read. A wider layer is computed in another order, so answers are equal within rounding only.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from neusemslice.graph import (
    Graph,
    Inputs,
    Site,
    Span,
    evaluation,
    is_transposed_linear,
    trace,
    weight_dims,
)
from neusemslice.maintain.freeing import separable
from neusemslice.maintain.tasks import TaskSet
from neusemslice.slicing import Slice

TOLERANCE = 1e-5
"""Largest difference that growing may make, relative to the output's scale (float32)."""


def grown(tasks: TaskSet, share: float, inputs: Inputs) -> TaskSet:
    """A copy of the set with wider layers; the new neurons are no task's.

    Args:
        share: how many neurons a layer gets, as a share of its own, rounded up.
        inputs: to trace the wider model with.

    Raises:
        ValueError: for a model without a layer that can be widened.
        RuntimeError: if a task does not answer as before.
    """
    graph = tasks.graph
    added = {
        name: math.ceil(share * graph.site(name).neurons)
        for group in separable(graph)
        if all(_can_grow(tasks.backbone, graph.site(name)) for name in group.sites)
        for name in group.sites
    }
    if not added:
        raise ValueError("extend: the model has no layer that can be widened")
    wider = copy.deepcopy(tasks)
    for tensor, insertions in _insertions(graph, added).items():
        name, _, own = tensor.rpartition(".")
        _insert(wider.backbone.get_submodule(name), own, insertions)
        for task in wider.tasks:
            if (part := wider.parts(task).get(name)) is not None:
                _insert(part, own, insertions)
    with evaluation(wider):
        found = trace(wider.backbone, inputs)
    for site in graph.sites:
        if found.site(site.name).neurons != site.neurons + added.get(site.name, 0):
            raise RuntimeError(f"extend: site {site.name} could not be widened")
    wider.tasks = {
        name: replace(task, slice=_padded(task.slice, found)) for name, task in wider.tasks.items()
    }
    for name in tasks.tasks:
        _check(tasks, wider, name, inputs)
    return wider


def fit_sizes(module: nn.Module) -> None:
    """Sets a layer's or batch norm's sizes to those of its tensors."""
    m: Any = module
    if isinstance(module, _BatchNorm):
        some = m.weight if m.weight is not None else m.running_mean
        m.num_features = len(some)
        return
    out_dim, in_dim = weight_dims(module)
    if isinstance(module, _ConvNd):
        if module.groups > 1:  # depthwise
            module.groups = module.in_channels = module.out_channels = len(module.weight)
        else:
            module.out_channels, module.in_channels = (
                m.weight.shape[out_dim],
                m.weight.shape[in_dim],
            )
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = m.weight.shape
    else:
        m.nx, m.nf = m.weight.shape


def _can_grow(backbone: nn.Module, site: Site) -> bool:
    """Whether its neurons are single features of known layers, which alone count them.

    A norm that mixes them would feel the new ones.
    """
    modules = {span.tensor.rpartition(".")[0] for span in (*site.rows, *site.columns)}
    return (
        not site.norms
        and all(count.module in modules for count in site.counts)
        and all(span.repeat == 1 for span in site.rows)
        and all(
            isinstance(m, (_ConvNd, nn.Linear, _BatchNorm)) or is_transposed_linear(m)
            for m in map(backbone.get_submodule, modules)
        )
    )


def _insertions(graph: Graph, added: dict[str, int]) -> dict[str, list[tuple[int, int, int, bool]]]:
    """By tensor: dimension, position, how many, and whether they are columns; last first."""
    found: dict[str, list[tuple[int, int, int, bool]]] = {}

    def note(site: Site, span: Span, columns: bool) -> None:
        end = span.start + site.neurons * span.repeat
        one = (span.dim, end, added[site.name] * span.repeat, columns)
        found.setdefault(span.tensor, []).append(one)

    for name in added:
        site = graph.site(name)
        for span in site.rows:
            note(site, span, False)
        for span in site.columns:
            note(site, span, True)
    return {tensor: sorted(some, reverse=True) for tensor, some in found.items()}


@torch.no_grad()
def _insert(module: nn.Module, name: str, insertions: list[tuple[int, int, int, bool]]) -> None:
    old: Tensor = getattr(module, name)
    tensor = old.detach()
    for dim, position, count, columns in insertions:
        before, after = tensor.split([position, tensor.shape[dim] - position], dim)
        shape = list(tensor.shape)
        shape[dim] = count
        block = tensor.new_zeros(shape)
        if not columns and tensor.ndim > 1:
            bound = (tensor.numel() / tensor.shape[dim]) ** -0.5
            block.uniform_(-bound, bound)
        elif not columns and (name == "running_var" or (name == "weight" and tensor.ndim == 1)):
            block.fill_(1)
        tensor = torch.cat([before, block, after], dim)
    put(module, name, tensor)


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Gives a module a tensor of another size, and the sizes that go with it."""
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, name, tensor)
    fit_sizes(module)


def _padded(old: Slice, graph: Graph) -> Slice:
    """The same neurons in the wider model."""
    masks = {}
    for site in graph.sites:
        mask = old.mask(site.name)
        masks[site.name] = torch.cat([mask, mask.new_zeros(site.neurons - len(mask))])
    return Slice(graph, masks)


def _check(tasks: TaskSet, wider: TaskSet, name: str, inputs: Inputs) -> None:
    with evaluation(tasks), evaluation(wider), torch.no_grad():
        before = tasks.answer(name, *inputs.args, **inputs.kwargs)
        after = wider.answer(name, *inputs.args, **inputs.kwargs)
    tolerance = max(TOLERANCE, 16 * torch.finfo(before.dtype).eps)
    if not bool((after - before).abs().max() <= tolerance * before.abs().max()):
        raise RuntimeError(f"extend: the wider model does not answer task {name} as before")
