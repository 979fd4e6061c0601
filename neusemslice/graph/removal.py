"""Whether neurons can go, found by letting some of them go.

Each group of sites loses every other neuron: producers give the rest of what they gave in a plain
run, and what else the neurons own is cut. Readers must then read the rest of what they read before.
A group for which they do not, or with which the model does not run, is kept whole. It may be added
to something that is no layer's answer, or the model may rely on its size.

A head may own more than features of layers: a row of a table of position biases, say. Such a
parameter is found as the heads are (attention.py): some heads' share of it is moved, and those
heads' features must change at the reader and no others. How many heads there are may also stand in
numbers of the attention's module, which have customary names. Numbers in a configuration, which
other modules share, are cut only where the model does not run otherwise.

A model that several ranks share has no tensors that could be cut or moved; its graph says what
tracing found, and a cut is proven later, as every cut is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from neusemslice.graph.attention import Attention, Heads, Parts, halves
from neusemslice.graph.cut import fewer_in, left_in, lower, tensors_of
from neusemslice.graph.layers import in_features, mixes_neurons, weight_dims
from neusemslice.graph.probe import Probe
from neusemslice.graph.sharding import is_sharded
from neusemslice.graph.sites import Count, Graph, Span

_NUMBERS = frozenset(
    {
        *("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads"),
        *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "groups"),
        *("all_head_size", "split_size", "inner_dim"),
    }
)
"""Names of numbers that are proportional to the number of heads."""

_SHARED = ("config.num_attention_heads", "config.num_key_value_heads")


def find_parts(heads: Mapping[Attention, Heads | str], probe: Probe) -> dict[Attention, Parts]:
    """For each attention that has heads, what they own apart from features of layers."""
    names = {module: name for name, module in probe.model.named_modules()}
    divided = {a: answer for a, answer in heads.items() if isinstance(answer, Heads)}
    homes = {a: home_of(a.sources, names) for a in divided}
    tables = {} if _is_shared(probe) else _tables(divided, homes, names, probe)
    return {
        a: Parts(tables.get(a, ()), counts_in(probe.model, homes[a], answer.neurons))
        for a, answer in divided.items()
    }


def tried_out(graph: Graph, probe: Probe) -> Graph:
    """The graph, with groups that the model cannot lose neurons of kept whole."""
    if _is_shared(probe):
        return graph
    found = with_problems(graph, lambda groups: _problem(graph, groups, probe))
    for index, group in enumerate(found.groups):
        if group.kept_whole and not graph.groups[index].kept_whole and len(group.sites) == 1:
            with_shared = _with_shared(found, group.sites[0], probe.model)
            if not _problem(with_shared, [index], probe):
                found = _with_reason(with_shared, index, "")
    return found


def _is_shared(probe: Probe) -> bool:
    return any(is_sharded(module) for module in probe.model.modules())


def with_problems(graph: Graph, problem: Callable[[Collection[int]], str]) -> Graph:
    """The graph, with groups that have a problem kept whole.

    Args:
        problem: why some groups, by their numbers, cannot all lose every other neuron; empty if
            they can.
    """
    free = [i for i, group in enumerate(graph.groups) if not group.kept_whole]
    free = [i for i in free if graph.site(graph.groups[i].sites[0]).neurons > 1]
    if free and problem(free):
        for index in free:
            graph = _with_reason(graph, index, problem([index]))
    return graph


def _with_reason(graph: Graph, index: int, reason: str) -> Graph:
    groups = list(graph.groups)
    groups[index] = replace(groups[index], kept_whole=reason)
    return replace(graph, groups=tuple(groups))


def does_not_run(error: Exception) -> str:
    """A group's problem with which a model raised an error."""
    reason = str(error).partition("\n")[0]
    return f"the model does not run without some of them: {type(error).__name__}: {reason}"


def home_of(sources: Iterable[nn.Module], names: Mapping[nn.Module, str]) -> str:
    """The innermost module around all of an attention's sources."""
    paths = [names[source].split(".")[:-1] for source in sources]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join(level[0] for level in levels)


def counts_in(model: nn.Module, home: str, neurons: int, shared: bool = False) -> tuple[Count, ...]:
    """The numbers in an attention's module, or its configuration, that fall with its heads."""
    module = model.get_submodule(home)
    if shared:
        config = getattr(module, "config", None)
        values = {name: getattr(config, name.partition(".")[2], None) for name in _SHARED}
    else:
        values = {name: value for name, value in vars(module).items() if name in _NUMBERS}
    return tuple(
        Count(home, name, value // neurons)
        for name, value in values.items()
        if type(value) is int and value > 0 and value % neurons == 0
    )


def _tables(
    heads: Mapping[Attention, Heads],
    homes: Mapping[Attention, str],
    names: Mapping[nn.Module, str],
    probe: Probe,
) -> dict[Attention, tuple[Span, ...]]:
    """Parameters of no layer along a dimension of which each head has a share of its own."""
    pending = {
        a: [
            (module, Span(f"{names[module]}.{name}".lstrip("."), dim, 0, size // heads[a].neurons))
            for module in probe.model.get_submodule(home).modules()
            if not (module in probe.layers or _is_known(module))
            for name, parameter in module.named_parameters(recurse=False)
            for dim, size in enumerate(parameter.shape)
            if parameter.is_floating_point() and size and size % heads[a].neurons == 0
        ]
        for a, home in homes.items()
    }
    found: dict[Attention, tuple[Span, ...]] = dict.fromkeys(heads, ())
    while pending := {a: left for a, left in pending.items() if left}:
        # One run serves all attentions, each with one of its parameters.
        tried = {a: left.pop() for a, left in pending.items()}
        parts = {a: list(halves(heads[a].neurons)) for a in tried}
        right = set(tried)
        for index in range(max(map(len, parts.values()))):
            asked = [a for a in right if index < len(parts[a])]
            with ExitStack() as stack:
                for a in asked:
                    module, span = tried[a]
                    stack.enter_context(_moved(module, span, parts[a][index]))
                changed = probe.changed({}, [a.reader for a in asked])
            for a in asked:
                expected = parts[a][index].repeat_interleave(heads[a].repeat)
                if not torch.equal(changed[a.reader], expected):
                    right.discard(a)
        for a in right:
            found[a] = (*found[a], tried[a][1])
    return found


def _is_known(module: nn.Module) -> bool:
    """Whether it is known to hold no share of any head alone."""
    return mixes_neurons(module) or isinstance(module, (nn.Embedding, _NormBase))


def _with_shared(graph: Graph, name: str, model: nn.Module) -> Graph:
    """The graph in which numbers in the configuration of a site's module count its neurons."""
    site = graph.site(name)
    names = {model.get_submodule(producer): producer for producer in site.producers}
    counts = counts_in(model, home_of(names, names), site.neurons, shared=True)
    more = replace(site, counts=(*site.counts, *counts))
    return replace(graph, sites=tuple(more if s is site else s for s in graph.sites))


def _problem(graph: Graph, groups: Collection[int], probe: Probe) -> str:
    """Why the groups together cannot lose every other neuron; empty if they can."""
    model = probe.model
    sites = [site for site in graph.sites if site.group in groups]
    masks = {site.name: next(halves(site.neurons)) for site in sites}
    layers = {layer.name: model.get_submodule(layer.name) for layer in graph.layers}
    tensors = tensors_of(model)
    kept: dict[nn.Module, Tensor] = {}
    readers: dict[nn.Module, Tensor] = {}
    try:
        with ExitStack() as stack:
            for tensor, dims in left_in(graph, masks, tensors).items():
                owner, _, name = tensor.rpartition(".")
                if owner not in layers:
                    stack.enter_context(_cut(model.get_submodule(owner), name, dims))
                elif name == "weight" and (rows := weight_dims(layers[owner])[0]) in dims:
                    kept[layers[owner]] = dims[rows]
            for site in sites:
                gone = (~masks[site.name]).nonzero().squeeze(1)
                for reader in site.readers:
                    layer = layers[reader.module]
                    every = torch.ones(in_features(layer), dtype=torch.bool)
                    there = Span("", 0, reader.start, reader.repeat)
                    readers.setdefault(layer, every)[there.indices(gone)] = False
            for owner, number, less in fewer_in(graph, masks):
                module = model.get_submodule(owner)
                stack.enter_context(_kept(module, number.partition(".")[0]))
                lower(module, number, less)
            fitting = probe.fits(kept, readers)
    except Exception as error:
        # A model that cannot run so may raise anything.
        return does_not_run(error)
    wrong = sorted(name for name, layer in layers.items() if layer in readers.keys() - fitting)
    return f"without some of them others do not reach {wrong[0]} as before" if wrong else ""


@contextmanager
def _cut(module: nn.Module, name: str, dims: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside the block, a tensor has some of its indices along some dimensions."""
    part = getattr(module, name).detach()
    for dim, left in dims.items():
        part = part.index_select(dim, left.nonzero().squeeze(1).to(part.device))
    with _swapped(module, name, part):
        yield


@contextmanager
def _moved(module: nn.Module, span: Span, half: Tensor) -> Iterator[None]:
    """Inside the block, some heads' share of a parameter is another one."""
    name = span.tensor.rpartition(".")[2]
    whole = module.get_parameter(name).detach()
    generator = torch.Generator().manual_seed(0)
    distance = 1 + torch.rand(whole.shape, generator=generator).to(whole)
    shape = [1] * whole.ndim
    shape[span.dim] = -1
    share = half.repeat_interleave(span.repeat).to(whole).view(shape)
    size = 1 + whole.nan_to_num(0, 0, 0).abs().amax()
    with _swapped(module, name, whole + size * distance * share):
        yield


@contextmanager
def _swapped(module: nn.Module, name: str, tensor: Tensor) -> Iterator[None]:
    """Inside the block, the module has another tensor as parameter or buffer of that name."""
    own: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    before = own[name]
    own[name] = nn.Parameter(tensor) if own is module._parameters else tensor
    try:
        yield
    finally:
        own[name] = before


@contextmanager
def _kept(module: nn.Module, name: str) -> Iterator[None]:
    """After the block, the module's attribute is what it was before."""
    own = getattr(module, name)
    try:
        yield
    finally:
        setattr(module, name, own)
