"""Running a model with some of its neurons at 0, by hooks that leave when the block ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from neusemslice.graph import Graph, Reader, choosing_among, device_of, reset_compiler

_IN_FORCE: WeakKeyDictionary[nn.Module, list[dict[str, Tensor]]] = WeakKeyDictionary()
"""Per model the masks of the blocks that it is in, outermost first, each within those before."""


@contextmanager
def masked(model: nn.Module, graph: Graph, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block every neuron outside the masks is 0 for whoever reads it.

    Of blocks within each other the intersection holds. See ``Slice.applied``.
    """
    blocks = _IN_FORCE.setdefault(model, [])
    inside = dict(masks)
    for name, around in blocks[-1].items() if blocks else ():
        inside[name] = inside[name] & around if name in inside else around
    norms = {norm.name for norm in graph.norms}
    with ExitStack() as stack:
        reset_compiler()
        # Called last, when the hooks are gone.
        stack.callback(reset_compiler)
        blocks.append(inside)
        stack.callback(blocks.pop)
        for name, (dim, keep) in _kept_features(model, graph, inside).items():
            module = model.get_submodule(name)
            before = module.register_forward_pre_hook(_select_input(dim, keep), with_kwargs=True)
            stack.callback(before.remove)
            if name in norms:
                after = module.register_forward_hook(_select_output(dim, keep))
                stack.callback(after.remove)
        for site in graph.sites:
            if site.readers[0].routed and not inside[site.name].all():
                router = model.get_submodule(site.producers[0])
                mask = inside[site.name].to(device_of(router))
                choice = choosing_among(site, mask)
                stack.callback(router.register_forward_hook(choice, with_kwargs=True).remove)
        yield


def in_units(graph: Graph, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks, grown to whole groups of GroupNorms: one is kept if any of its neurons is."""
    grown = dict(masks)
    changed = True
    while changed:
        changed = False
        for norm in graph.norms:
            if norm.units == norm.features:
                continue
            places = [
                (site.name, place)
                for site in graph.sites
                for place in site.norms
                if place.module == norm.name
            ]
            features = torch.ones(norm.features, dtype=torch.bool)
            for name, place in places:
                own = grown[name].repeat_interleave(place.repeat)
                _part(features, place, grown[name]).copy_(own)
            size = norm.features // norm.units
            features = features.view(norm.units, size).any(1).repeat_interleave(size)
            for name, place in places:
                mask = grown[name]
                grown[name] = _part(features, place, mask).view(len(mask), -1).any(1)
                changed |= not torch.equal(grown[name], mask)
    return grown


def _part(features: Tensor, place: Reader, mask: Tensor) -> Tensor:
    """The features that belong to the mask's neurons."""
    return features[place.start : place.start + len(mask) * place.repeat]


def _kept_features(
    model: nn.Module, graph: Graph, masks: Mapping[str, Tensor]
) -> dict[str, tuple[int, Tensor]]:
    """For each reader and norm that sees a masked neuron: features to keep, and their dimension."""
    sizes = {layer.name: layer.inputs for layer in graph.layers}
    sizes |= {norm.name: norm.features for norm in graph.norms}
    masks = in_units(graph, masks)
    kept: dict[str, tuple[int, Tensor]] = {}
    for site in graph.sites:
        mask = masks[site.name]
        for place in (*site.readers, *site.norms):
            if place.routed:
                continue  # left out by the router
            blank = torch.ones(sizes[place.module], dtype=torch.bool)
            _, features = kept.setdefault(place.module, (place.dim, blank))
            _part(features, place, mask).logical_and_(mask.repeat_interleave(place.repeat))
    device = device_of(model)
    return {
        name: (dim, features.to(next((p.device for p in parameters), device)))
        for name, (dim, features) in kept.items()
        if not bool(features.all())
        for parameters in [model.get_submodule(name).parameters()]
    }


def _selected(x: Tensor, dim: int, keep: Tensor) -> Tensor:
    shape = [1] * x.ndim
    shape[dim] = -1
    return torch.where(keep.view(shape), x, x.new_zeros(()))


def _select_input(
    dim: int, keep: Tensor
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        selected = _selected(args[0] if args else kwargs["input"], dim, keep)
        return ((selected, *args[1:]), kwargs) if args else (args, {**kwargs, "input": selected})

    return hook


def _select_output(dim: int, keep: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _selected(output, dim, keep)

    return hook
