"""Norms that mix neurons: where on their way to a reader a site's neurons meet one.

A LayerNorm, GroupNorm or RMSNorm divides each neuron by what it and others are together. So a
neuron that is to be 0 must be 0 before the norm, where others would feel it, and after it, where
the norm's bias would bring it back. Norms called as functions are no modules; the neurons that pass
one do not arrive one to one and are no site.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from neusemslice.graph.attention import nodes_before
from neusemslice.graph.layers import Run, dim_of, out_features
from neusemslice.graph.probe import Probe
from neusemslice.graph.sites import Graph, Norm, Reader


def with_norms(
    graph: Graph, model: nn.Module, names: dict[nn.Module, str], run: Run, probe: Probe
) -> Graph:
    """The graph with the norms that mix neurons of its sites.

    Like a reader, a norm that sees a sum of several sites belongs to the last of them.
    """
    writers = {node: layer for layer, call in run.calls.items() for node in call.writes}
    site_of = {producer: i for i, site in enumerate(graph.sites) for producer in site.producers}
    widths = {layer.name: layer.inputs for layer in graph.layers}
    found: dict[nn.Module, dict[tuple[int, int], int]] = {}
    for norm, call in run.norms.items():
        if call.count > 1:
            continue
        size = probe.plain[norm].shape[dim_of(norm)]
        for node in nodes_before(call.reads, writers):
            index = site_of.get(names[writers[node]]) if node in writers else None
            if index is None:
                continue
            site = graph.sites[index]
            if out_features(writers[node]) != site.neurons:
                continue  # what makes a head is not the head
            places = {(r.start, r.repeat) for r in site.readers if widths[r.module] == size}
            if site.neurons == size:
                places = {(0, 1)}
            if len(places) == 1:
                last = found.setdefault(norm, {})
                place = next(iter(places))
                last[place] = max(last.get(place, -1), index)
    claims: dict[nn.Module, dict[nn.Module, tuple[int, int]]] = {}
    for norm, last in found.items():
        for place, index in last.items():
            for name in graph.sites[index].producers:
                claims.setdefault(model.get_submodule(name), {})[norm] = place
    wrong = {(names[layer], norm) for layer, norm in probe.wrong(claims)}
    sites = list(graph.sites)
    kept = []
    for norm, last in found.items():
        dim, size = dim_of(norm), probe.plain[norm].shape[dim_of(norm)]
        right = [
            (place, i)
            for place, i in last.items()
            if not any((name, norm) in wrong for name in sites[i].producers)
        ]
        for (start, repeat), i in right:
            there = Reader(names[norm], dim, start, repeat)
            sites[i] = replace(sites[i], norms=(*sites[i].norms, there))
        if right:
            units = norm.num_groups if isinstance(norm, nn.GroupNorm) else size
            kept.append(Norm(names[norm], dim, size, units))
    return replace(graph, sites=tuple(sites), norms=tuple(kept))
