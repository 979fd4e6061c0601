"""Fused experts: a router that chooses for each token, and one parameter for all experts' weights.

An expert is a neuron. What it owns is its row of the router and its share of each of the experts'
parameters; what is seen of it is the weight with which it is chosen, 0 where it is not. A router
divides its choice among the experts that there are, as a norm does: so one of them is left out by
letting the router choose among the others, and that is what the router does once it is removed.

The router is the module whose answer the experts are given, with a row for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neusemslice.graph.model import tensors_in
from neusemslice.graph.sites import Count, Graph, Group, Reader, Site, Span

_NUMBER = "num_experts"
_CHOSEN = "top_k"


@dataclass
class Routing:
    """What a forward pass showed of fused experts.

    Attributes:
        order: how many layers had been called before.
        rows: tokens that they saw.
        each: how many experts each token has.
        router: the module that chose, if it is one.
        count: how often they were called.
    """

    order: int
    rows: int
    each: int
    router: nn.Module | None
    count: int = 0


@dataclass
class Watch:
    """Hooks that note how experts are called.

    Attributes:
        found: per module of fused experts.
        handles: of the hooks.
    """

    found: dict[nn.Module, Routing] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)


def watch(model: nn.Module, calls: Collection[Any]) -> Watch:
    """Notes calls of experts from now on; ``calls`` has one entry per layer called so far."""
    result = Watch()
    # The tensors themselves, because an object that is gone leaves its number to another.
    made: list[tuple[Tensor, nn.Module]] = []

    def note(router: nn.Module, args: Any, output: object) -> None:
        made.extend((tensor, router) for tensor in tensors_in(output))

    def begin(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index, weights = _choice(args, kwargs)
        routers = {m for t, m in made if t is weights} & {m for t, m in made if t is index}
        router = next(iter(routers), None)
        tokens, each = index.shape
        routing = Routing(len(calls), tokens, each, router)
        result.found.setdefault(experts, routing).count += 1

    experts = [module for module in model.modules() if are_experts(module)]
    sizes = {getattr(module, _NUMBER) for module in experts}
    for module in experts:
        result.handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and weight.shape[0] in sizes:
            result.handles.append(module.register_forward_hook(note))
    return result


def are_experts(module: nn.Module) -> bool:
    """Whether it is a module of fused experts, as transformers builds them."""
    number = getattr(module, _NUMBER, None)
    own = list(module.parameters(recurse=False))
    return (
        type(module).__name__.endswith("Experts")
        and bool(own)
        and all(parameter.shape[:1] == (number,) for parameter in own)
    )


def expert_macs(found: Mapping[nn.Module, Routing], samples: int) -> int:
    """Multiply-adds of one sample in fused experts: as many, however few experts there are."""
    return sum(
        routing.rows * routing.each * parameter[0].numel() // samples
        for experts, routing in found.items()
        for parameter in experts.parameters(recurse=False)
        if parameter.ndim == 3
    )


def with_experts(
    graph: Graph,
    names: Mapping[nn.Module, str],
    found: Mapping[nn.Module, Routing],
    samples: int,
) -> Graph:
    """The graph with a site for each module of fused experts, in the order of the forward pass."""
    place = {layer.name: (i, 1) for i, layer in enumerate(graph.layers)}
    place |= {names[experts]: (routing.order, 0) for experts, routing in found.items()}
    sites, groups, skipped = list(graph.sites), list(graph.groups), dict(graph.skipped)
    for experts, routing in found.items():
        router, name = routing.router, names[experts]
        chosen = getattr(router, _CHOSEN, None)
        if router is None or not isinstance(chosen, int) or routing.count > 1:
            skipped[name] = "no module chooses among its experts, once for each token"
            continue
        if routing.rows % samples:
            skipped[name] = f"reads {routing.rows} rows that are not samples or parts of them"
            continue
        neurons = int(getattr(experts, _NUMBER))
        sites.append(
            Site(
                name=name,
                neurons=neurons,
                group=len(groups),
                producers=(names[router],),
                readers=(Reader(name, -1, pieces=routing.rows > samples, routed=True),),
                rows=tuple(
                    Span(f"{names[module]}.{tensor}", 0)
                    for module in (router, experts)
                    for tensor, parameter in module.named_parameters(recurse=False)
                    if parameter.shape[0] == neurons
                ),
                columns=(),
                counts=tuple(
                    Count(names[module], _NUMBER, 1)
                    for module in (router, experts)
                    if getattr(module, _NUMBER, None) == neurons
                ),
            )
        )
        groups.append(Group((name,), least=chosen))
        skipped.pop(name, None)
    sites.sort(key=lambda site: place[site.readers[0].module])
    return replace(
        graph,
        sites=tuple(sites),
        groups=tuple(groups),
        skipped=skipped,
        expert_macs=expert_macs(found, samples),
    )


def shares(
    args: tuple[Any, ...], kwargs: dict[str, Any], experts: int
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The weight of every expert for each token ``[T, E]`` in what fused experts are called with.

    Args:
        args, kwargs: the arguments.
        experts: their number ``E``.

    Returns:
        The weights, and arguments of the same values that depend on them.
    """
    index, weights = _choice(args, kwargs)
    every = weights.new_zeros(len(weights), experts).scatter(1, index, weights)
    again = every.gather(1, index)
    if "top_k_weights" in kwargs:
        return every, args, {**kwargs, "top_k_weights": again}
    return every, (*args[:2], again, *args[3:]), kwargs


def _choice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which experts each token has, and their weights, ``[T, k]`` each."""
    index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
    weights = kwargs["top_k_weights"] if "top_k_weights" in kwargs else args[2]
    assert isinstance(index, Tensor)
    assert isinstance(weights, Tensor)
    return index, weights


def choosing_among(site: Site, mask: Tensor) -> Callable[..., Any]:
    """A forward hook for a site's router with which it chooses among some experts.

    If there are fewer than it chooses, it chooses them all; if there are none, they weigh nothing.

    Args:
        site: of the experts.
        mask: bool ``[E]``, on the router's device.
    """
    left = mask.nonzero().squeeze(1)
    own = [
        span.tensor.rpartition(".")[2]
        for span in site.rows
        if span.tensor.rpartition(".")[0] == site.producers[0]
    ]

    def hook(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not len(left):
            return type(output)(t * 0 if t.is_floating_point() else t for t in output)
        with _narrowed(router, own, left):
            chosen = router.forward(*args, **kwargs)
        return type(chosen)(t if t.is_floating_point() else left[t] for t in chosen)

    return hook


@contextmanager
def _narrowed(router: Any, names: Collection[str], left: Tensor) -> Iterator[None]:
    """Inside the block, a router has some of its rows."""
    parameters, number = dict(router._parameters), getattr(router, _NUMBER, None)
    chosen = getattr(router, _CHOSEN)
    try:
        for name in names:
            router._parameters[name] = parameters[name].index_select(0, left)
        if number is not None:
            setattr(router, _NUMBER, len(left))
        setattr(router, _CHOSEN, min(chosen, len(left)))
        yield
    finally:
        router._parameters.update(parameters)
        setattr(router, _CHOSEN, chosen)
        if number is not None:
            setattr(router, _NUMBER, number)
