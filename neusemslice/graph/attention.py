"""Attention heads, found by what a model does and not by what its modules are called.

An attention lies between the layers that give queries, keys and values and the layer that reads
what they make of each other. Autograd's graph shows it: on the way from the reader back to those
layers there is a product with a softmax, or an operator that contains both, and some layers are
reached through it alone.

Its heads are found by experiment (probe.py). One feature of each source is moved; the features of
the reader's input that change are together in one head, so a head has no fewer. From there on the
smallest division is looked for in which every neuron's rows change the neuron's own features and
no others. With grouped queries the keys tie query heads together, so that a neuron comes out as
one group of keys and values with its query heads. Layouts of fused sources are tried in the same
way: a head's rows side by side, or all queries before all keys before all values.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.graph.layers import (
    Call,
    dim_of,
    in_features,
    is_grouped,
    out_features,
    rows_of,
    weight_dims,
)
from neusemslice.graph.probe import Probe
from neusemslice.graph.sites import Count, Graph, Group, Reader, Site, Span

Layout = tuple[tuple[int, int], ...]
"""(start, repeat) of each range of a source's output features that holds neurons."""


IDLE = "queries and keys change nothing in the batch that the model was traced with"
"""Why nothing can be said of an attention, not even that it is none."""


UNDIVIDED = "its attention does not divide into heads with queries, keys and values of their own"
"""Why an attention has no neurons."""


@dataclass(frozen=True)
class Attention:
    """An attention.

    Attributes:
        reader: the layer that reads it: the output projection.
        sources: the layers it is made from, in the order of their calls.
    """

    reader: nn.Module
    sources: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Heads:
    """The division of an attention into neurons: heads, or groups of heads that share keys.

    Attributes:
        neurons: how many.
        repeat: features of the reader's input that each has.
        layouts: where each source's output features belong to them, the values' source first.
    """

    neurons: int
    repeat: int
    layouts: Mapping[nn.Module, Layout]


@dataclass(frozen=True)
class Parts:
    """What heads own apart from features of layers.

    Attributes:
        rows: parameters that no layer computes with, such as tables of biases.
        counts: numbers in modules that say how many heads there are.
    """

    rows: tuple[Span, ...] = ()
    counts: tuple[Count, ...] = ()


def find_attentions(calls: Mapping[nn.Module, Call]) -> list[Attention]:
    """The attentions of a model whose layers were run with gradients, in the order of the run."""
    writers = {node: layer for layer, call in calls.items() for node in call.writes}
    found = []
    for reader, call in calls.items():
        nodes = nodes_before(call.reads, writers)
        mixers = {node for node in nodes if _is_attention(node, writers)}
        if not mixers:
            continue
        sources = {writers[node] for node in nodes if node in writers}
        around = {writers[n] for n in nodes_before(call.reads, writers, mixers) if n in writers}
        # Around an attention that is one branch of a residual stream, all of its layers are
        # reached: that reader is not the attention's own.
        if sources - around:
            ordered = sorted(sources, key=lambda layer: calls[layer].order)
            found.append(Attention(reader, tuple(ordered)))
    return found


def with_heads(
    graph: Graph,
    heads: Mapping[Attention, Heads | str],
    parts: Mapping[Attention, Parts],
    names: Mapping[nn.Module, str],
    calls: Mapping[nn.Module, Call],
) -> Graph:
    """The graph with a site for each attention, in the order of the forward pass."""
    sites, groups, skipped = list(graph.sites), list(graph.groups), dict(graph.skipped)
    owned: set[nn.Module] = set()
    for attention, answer in heads.items():
        if isinstance(answer, Heads) and not owned.isdisjoint(attention.sources):
            answer = "its attention shares a layer with another one"
        if isinstance(answer, str):
            seen = {name for site in sites for name in site.producers}
            left = (names[source] for source in attention.sources if names[source] not in seen)
            skipped.update(dict.fromkeys(left, answer))
            continue
        owned.update(attention.sources)
        for source in attention.sources:
            skipped.pop(names[source], None)
        sites.append(_site(attention, answer, parts[attention], names, calls, len(groups)))
        groups.append(Group((sites[-1].name,)))
    order = {names[layer]: call.order for layer, call in calls.items()}
    sites.sort(key=lambda site: order[site.readers[0].module])
    return replace(graph, sites=tuple(sites), groups=tuple(groups), skipped=skipped)


def _site(
    attention: Attention,
    heads: Heads,
    parts: Parts,
    names: Mapping[nn.Module, str],
    calls: Mapping[nn.Module, Call],
    group: int,
) -> Site:
    reader, name = attention.reader, names[attention.reader]
    dim = weight_dims(reader)[1]
    return Site(
        name=names[next(iter(heads.layouts))],
        neurons=heads.neurons,
        group=group,
        producers=tuple(names[source] for source in heads.layouts),
        readers=(Reader(name, dim_of(reader), 0, heads.repeat, calls[reader].pieces),),
        rows=tuple(
            span
            for source, layout in heads.layouts.items()
            for start, repeat in layout
            for span in rows_of(source, names[source], start, repeat)
        )
        + parts.rows,
        columns=(Span(f"{name}.weight", dim, 0, heads.repeat),),
        counts=parts.counts,
    )


def nodes_before(
    starts: Collection[Any], writers: Mapping[Any, nn.Module], closed: Collection[Any] = ()
) -> set[Any]:
    """Autograd nodes up to ``starts``; not through layers, and not into closed nodes."""
    seen: set[Any] = set()
    pending = [node for node in starts if node is not None and node not in closed]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in writers:
            before = (n for n, _ in node.next_functions)
            pending.extend(n for n in before if n is not None and n not in closed)
    return seen


def _is_attention(node: Any, writers: Mapping[Any, nn.Module]) -> bool:
    name = node.name().lower()
    if "attention" in name or "attn" in name:
        return True
    if not name.startswith("bmm") or node in writers:
        return False
    return any("softmax" in before.name().lower() for before in nodes_before([node], writers))


def find_heads(
    attentions: list[Attention], calls: Mapping[nn.Module, Call], probe: Probe
) -> dict[Attention, Heads | str]:
    """For each attention its heads, or why they cannot be told apart."""
    searches = [_search(attention, calls) for attention in attentions]
    answers: dict[int, Heads | str] = {}
    moves: dict[int, dict[nn.Module, Tensor]] = {}
    replies: dict[int, Tensor | None] = dict.fromkeys(range(len(searches)))
    while len(answers) < len(searches):
        for index, reply in replies.items():
            try:
                # A generator is started by sending nothing.
                moves[index] = searches[index].send(reply)  # type: ignore[arg-type]
            except StopIteration as stop:
                answers[index] = stop.value
        # One run serves all attentions that have no layer in common.
        moved: dict[nn.Module, Tensor] = {}
        asked: list[int] = []
        used: set[nn.Module] = set()
        for index in moves:
            if used.isdisjoint(attentions[index].sources):
                used.update(attentions[index].sources)
                moved.update(moves[index])
                asked.append(index)
        changed = probe.changed(moved, [attentions[index].reader for index in asked])
        replies = {index: changed[attentions[index].reader] for index in asked}
        for index in asked:
            del moves[index]
    return {attention: answers[index] for index, attention in enumerate(attentions)}


_Search = Generator[dict[nn.Module, Tensor], Tensor, Heads | str]
"""Yields the features to move in each source; is sent the features that changed at the reader."""


def _search(attention: Attention, calls: Mapping[nn.Module, Call]) -> _Search:
    reader, sources = attention.reader, attention.sources
    for layer in (*sources, reader):
        if calls[layer].problem or is_grouped(layer):
            problem = calls[layer].problem or "is a grouped convolution"
            return f"a layer of its attention {problem}"
    if calls[reader].unseen:
        return f"the layer that reads its attention {calls[reader].unseen}"
    width = in_features(reader)
    least = 0
    values = []
    for source in sources:
        first = torch.arange(out_features(source)) == 0
        touched = (yield {source: first}).nonzero().flatten().tolist()
        least = max(least, 1 + max(touched, default=0))
        if touched and 1 not in touched:
            # One feature of a value is one feature of each head that reads it; one feature of a
            # query or a key is all features of its heads.
            values.append(source)
    if least < 2:
        return IDLE
    for repeat in range(least, width // 2 + 1):
        if width % repeat:
            continue
        layouts = yield from _layouts(sources, width, width // repeat)
        if layouts is not None:
            named = (values or sources)[0]
            first_named = {named: layouts[named], **layouts}
            return Heads(width // repeat, repeat, first_named)
    return UNDIVIDED


def _layouts(
    sources: tuple[nn.Module, ...], width: int, neurons: int
) -> Generator[dict[nn.Module, Tensor], Tensor, dict[nn.Module, Layout] | None]:
    """The layout of each source in which that many neurons keep to themselves, if there are."""
    repeat = width // neurons
    parts = list(halves(neurons))
    layouts: dict[nn.Module, Layout] = {}
    for source in sources:
        size = out_features(source)
        for layout in _possible_layouts(size, width, neurons):
            changed = yield {source: _features(layout, parts[0], size)}
            if not (changed & ~parts[0].repeat_interleave(repeat)).any():
                layouts[source] = layout
                break
        else:
            return None
    for part in parts:
        moved = {
            source: _features(layout, part, out_features(source))
            for source, layout in layouts.items()
        }
        if not torch.equal((yield moved), part.repeat_interleave(repeat)):
            return None
    return layouts


def _possible_layouts(size: int, width: int, neurons: int) -> Iterator[Layout]:
    """Ways in which ``size`` features can belong to neurons that have ``width`` together."""
    if size % neurons == 0:
        yield ((0, size // neurons),)
    if size % (2 * neurons) == 0:
        yield ((0, size // 2 // neurons), (size // 2, size // 2 // neurons))
    shared = (size - width) // 2
    if shared > 0 and (size - width) % (2 * neurons) == 0:
        keys = shared // neurons
        yield ((0, width // neurons), (width, keys), (width + shared, keys))


def halves(neurons: int) -> Iterator[Tensor]:
    """Subsets, bool [C], such that any neuron is in one that any other is not in."""
    index = torch.arange(neurons)
    for bit in range((neurons - 1).bit_length()):
        half = (index >> bit) % 2 == 1
        yield half
        yield ~half


def _features(layout: Layout, neurons: Tensor, size: int) -> Tensor:
    """The features that belong to some neurons, bool [size]."""
    features = torch.zeros(size, dtype=torch.bool)
    for start, repeat in layout:
        features[start : start + len(neurons) * repeat] = neurons.repeat_interleave(repeat)
    return features
