"""From torch-pruning's graph of a model to sites and coupled groups.

torch-pruning's DependencyGraph says which tensors change together when an output channel goes; it
follows autograd's graph, so functional calls and residual adds are seen. Its answer is a list of
(module, indices) with no notion of a site, and it can be wrong (a shortcut padded with zeros looks
like an elementwise operation, and so does a transpose). So it is read here, never believed: a
group is free to lose neurons only if every index of every member maps one to one, what it says of
readers is tried on the model (probe.py), and removal is checked against masking later.

A site is found by walking from a producer through everything that is not a convolution or linear
layer; the first reader in forward order is where its neurons are observed. Several producers that
are first read at the same tensor (a residual branch and its projection) are one site. A reader
further down a residual stream sees the sum of several sites; the last of them governs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from neusemslice.graph.dependencies import Dependencies
from neusemslice.graph.layers import (
    Call,
    dim_of,
    in_features,
    is_depthwise,
    is_grouped,
    is_layer,
    mixes_neurons,
    norm_rows,
    out_features,
    rows_of,
    weight_dims,
)
from neusemslice.graph.probe import Probe
from neusemslice.graph.sites import Count, Graph, Group, Reader, Site, Span

if TYPE_CHECKING:
    from torch_pruning.dependency.node import Node


@dataclass
class _Group:
    """torch-pruning's answer for all output channels of one producer."""

    # Other layers' outputs, readers' inputs and norms, each with where the producer's channels are.
    outputs: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)
    inputs: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)
    norms: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)
    # Parameters of no layer or norm that the neurons meet, and along which dimension.
    parameters: dict[str, Span] = field(default_factory=dict)
    problem: str = ""


def with_traced(
    graph: Graph,
    names: dict[nn.Module, str],
    calls: dict[nn.Module, Call],
    found: Dependencies,
    probe: Probe,
) -> Graph:
    """``graph``, which has no sites, with those of neurons that reach readers one to one."""
    return _Tracer(graph, names, calls, found, probe).graph()


class _Tracer:
    def __init__(
        self,
        graph: Graph,
        names: dict[nn.Module, str],
        calls: dict[nn.Module, Call],
        found: Dependencies,
        probe: Probe,
    ) -> None:
        self.bare = graph
        self.names = names
        self.calls = calls
        self.attending = found.attending
        self.dependencies = found.graph
        self.roots = found.roots
        self.probe = probe
        self.nodes: dict[object, Node] = found.graph.module2node
        self.skipped = dict(graph.skipped)

    def graph(self) -> Graph:
        producers = sorted(
            (m for m in self.calls if m in self.nodes and m not in self.attending),
            key=lambda m: self.calls[m].order,
        )
        groups = {producer: self._group(producer) for producer in producers}
        self._try_out(groups)
        first_reader: dict[nn.Module, nn.Module] = {}
        outputs = []
        for producer in producers:
            readers = sorted(self._downstream(producer), key=lambda m: self.calls[m].order)
            if readers and readers[0] in groups[producer].inputs:
                first_reader[producer] = readers[0]
            elif self._reaches_output(producer):
                outputs.append(producer)
            else:
                reason = groups[producer].problem or "no layer reads its neurons one to one"
                self.skipped[self.names[producer]] = reason
        return self._assemble(self._sites(first_reader, groups), groups, outputs)

    def _group(self, producer: nn.Module) -> _Group:
        """Reads torch-pruning's group, turning its index lists into (start, repeat)."""
        prune = self.dependencies.get_pruner_of_module(producer).prune_out_channels
        every = list(range(out_features(producer)))
        group = _Group()
        try:
            items = self.dependencies.get_pruning_group(producer, prune, every)
        except Exception as error:
            # As in tracing, torch-pruning raises whatever it runs into.
            found = f"{type(error).__name__}: {error}"
            group.problem = f"torch-pruning cannot tell what its neurons are coupled with: {found}"
            return group
        for item in items:
            module, handler = item.dep.target.module, item.dep.handler
            if isinstance(module, nn.Parameter):
                self._add_parameter(group, producer, item)
            if module is producer or not isinstance(module, nn.Module):
                continue
            if module not in self.names:
                continue  # an operation, not a module: nothing of it is stored
            neurons = out_features(producer)
            span = _as_span(item.idxs, item.root_idxs, neurons)
            is_output = self.dependencies.is_out_channel_pruning_fn(handler)
            if module in self.calls:
                self._add_layer(group, producer, module, span, is_output)
            elif span is not None and isinstance(module, _NormBase):
                group.norms[module] = span
            elif mixes_neurons(module) or any(True for _ in module.parameters(recurse=False)):
                kind_name = type(module).__name__
                group.problem = f"{self.names[module]} ({kind_name}) mixes or transforms neurons"
        if is_grouped(producer):
            group.problem = "it is a grouped convolution"
        if self._reaches_output(producer):
            group.problem = "its neurons are part of the model's output"
        for module in (producer, *group.inputs, *group.outputs):
            if self.calls[module].problem:
                group.problem = f"{self.names[module]} {self.calls[module].problem}"
        return group

    def _try_out(self, groups: dict[nn.Module, _Group]) -> None:
        """Strikes out readers at which a producer's neurons do not arrive as the group says."""
        direct = {
            producer: {
                reader: group.inputs[reader]
                for reader in self._downstream(producer)
                if reader in group.inputs
            }
            for producer, group in groups.items()
        }
        for producer, reader in self.probe.wrong(direct):
            group = groups[producer]
            del group.inputs[reader]
            if not group.problem:
                name = self.names[reader]
                group.problem = f"its neurons do not arrive one to one at {name}"

    def _add_layer(
        self,
        group: _Group,
        producer: nn.Module,
        module: nn.Module,
        span: tuple[int, int] | None,
        is_output: bool,
    ) -> None:
        """Enters a convolution or linear layer that changes together with the producer."""
        name, neurons = self.names[module], out_features(producer)
        reads = not is_output or is_depthwise(module)
        if span is None or (reads and neurons * span[1] + span[0] > in_features(module)):
            group.problem = f"its neurons do not map one to one to {name}"
            if reads and neurons == in_features(module):
                # The map went astray elsewhere in the group; a reader of as many features as the
                # producer has neurons can still be observed, though nothing may be removed.
                group.inputs[module] = (0, 1)
            return
        if is_output or is_depthwise(module):
            group.outputs[module] = span
            if span != (0, 1) or out_features(module) != neurons:
                group.problem = f"it shares only a part of {name}'s neurons"
        if reads:
            group.inputs[module] = span
        if is_grouped(module):
            group.problem = f"{name} is a grouped convolution"

    def _add_parameter(self, group: _Group, producer: nn.Module, item: Any) -> None:
        """Enters a parameter that is no layer's or norm's, as torch-pruning meets it."""
        parameter = item.dep.target.module
        name, dim = self.dependencies._param_to_name[parameter], item.dep.target.pruning_dim
        neurons = out_features(producer)
        span = _as_span(item.idxs, item.root_idxs, neurons)
        if span is None or span[0] + neurons * span[1] > parameter.shape[dim]:
            group.problem = f"its neurons do not map one to one to the parameter {name}"
        else:
            group.parameters[name] = Span(name, dim % parameter.ndim, *span)

    def _downstream(self, producer: nn.Module) -> list[nn.Module]:
        """Layers that read the producer's output without another layer in between."""
        return [n.module for n in _walk(self.nodes[producer], "outputs") if n.module in self.calls]

    def _upstream(self, module: nn.Module) -> list[nn.Module]:
        """Layers whose output the module reads without another layer in between."""
        return [n.module for n in _walk(self.nodes[module], "inputs") if n.module in self.calls]

    def _reaches_output(self, producer: nn.Module) -> bool:
        node = self.nodes[producer]
        passed = [node, *(n for n in _walk(node, "outputs") if not is_layer(n.module))]
        return any(n.grad_fn in self.roots or not n.outputs for n in passed)

    def _sites(
        self, first_reader: dict[nn.Module, nn.Module], groups: dict[nn.Module, _Group]
    ) -> list[list[nn.Module]]:
        """Producers that are observed together, in the order of their readers."""
        places: dict[tuple[object, ...], list[nn.Module]] = {}
        for producer, reader in first_reader.items():
            if self.calls[reader].problem or self.calls[producer].problem:
                self.skipped[self.names[producer]] = groups[producer].problem
                continue
            if unseen := self.calls[reader].unseen:
                self.skipped[self.names[producer]] = f"{self.names[reader]} {unseen}"
                continue
            span = groups[producer].inputs[reader]
            # Readers of one tensor are one place: they have the same predecessor in the graph.
            width = out_features(producer)
            place = (*(id(node) for node in self.nodes[reader].inputs), *span, width)
            places.setdefault(place, []).append(producer)
        return sorted(places.values(), key=lambda ps: self.calls[first_reader[ps[0]]].order)

    def _assemble(
        self,
        sites: list[list[nn.Module]],
        groups: dict[nn.Module, _Group],
        outputs: list[nn.Module],
    ) -> Graph:
        site_of = {producer: i for i, producers in enumerate(sites) for producer in producers}
        readers: list[list[Reader]] = [[] for _ in sites]
        columns: list[list[Span]] = [[] for _ in sites]
        for module in sorted(self.calls, key=lambda m: self.calls[m].order):
            for i, (start, repeat) in self._governors(module, site_of, groups, "inputs"):
                readers[i].append(
                    Reader(
                        self.names[module],
                        dim_of(module),
                        start,
                        repeat,
                        self.calls[module].pieces,
                    )
                )
                if not is_depthwise(module):
                    weight = f"{self.names[module]}.weight"
                    columns[i].append(Span(weight, weight_dims(module)[1], start, repeat))
        rows = [self._rows(producers) for producers in sites]
        counts: list[list[Count]] = [[] for _ in sites]
        norms = {norm for group in groups.values() for norm in group.norms}
        for norm in sorted(norms, key=lambda m: self.names[m]):
            for i, (start, repeat) in self._governors(norm, site_of, groups, "norms"):
                rows[i] += norm_rows(norm, self.names[norm], start, repeat)
                counts[i].append(Count(self.names[norm], "num_features", repeat))
        self._add_parameters(rows, sites, groups)
        group_of, coupled = self._couple(sites, site_of, groups)
        return replace(
            self.bare,
            sites=tuple(
                Site(
                    name=self.names[producers[0]],
                    neurons=out_features(producers[0]),
                    group=group_of[i],
                    producers=tuple(self.names[p] for p in producers),
                    readers=tuple(readers[i]),
                    rows=tuple(rows[i]),
                    columns=tuple(columns[i]),
                    counts=tuple(counts[i]),
                )
                for i, producers in enumerate(sites)
            ),
            groups=coupled,
            outputs=tuple(self.names[m] for m in outputs),
            skipped=self.skipped,
        )

    def _governors(
        self,
        module: nn.Module,
        site_of: dict[nn.Module, int],
        groups: dict[nn.Module, _Group],
        kind: str,
    ) -> list[tuple[int, tuple[int, int]]]:
        """For each range of the module's features, the last of the sites that it holds."""
        if module not in self.nodes:
            return []
        last: dict[tuple[int, int], int] = {}
        for producer in self._upstream(module):
            if producer not in site_of:
                continue
            span = getattr(groups[producer], kind).get(module)
            if span is not None:
                last[span] = max(last.get(span, -1), site_of[producer])
        return sorted((i, span) for span, i in last.items())

    def _rows(self, producers: Iterable[nn.Module]) -> list[Span]:
        spans = []
        for producer in producers:
            spans += rows_of(producer, self.names[producer])
        return spans

    def _add_parameters(
        self,
        rows: list[list[Span]],
        sites: list[list[nn.Module]],
        groups: dict[nn.Module, _Group],
    ) -> None:
        """Gives each parameter of no layer or norm to the first of the sites that meet it."""
        owned: set[tuple[str, int, int]] = set()
        for own, producers in zip(rows, sites, strict=True):
            for producer in producers:
                for span in groups[producer].parameters.values():
                    place = (span.tensor, span.dim, span.start)
                    if place not in owned:
                        owned.add(place)
                        own.append(span)

    def _couple(
        self,
        sites: list[list[nn.Module]],
        site_of: dict[nn.Module, int],
        groups: dict[nn.Module, _Group],
    ) -> tuple[list[int], tuple[Group, ...]]:
        """Joins sites that share a group; says why a group must be kept whole."""
        parent = list(range(len(sites)))

        def find(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        problems: dict[int, str] = {}
        for i, producers in enumerate(sites):
            for producer in producers:
                if groups[producer].problem:
                    problems.setdefault(i, groups[producer].problem)
                for other in groups[producer].outputs:
                    if other in site_of:
                        a, b = sorted((find(i), find(site_of[other])))
                        parent[b] = a
                    else:
                        problems.setdefault(i, f"{self.names[other]} is not observed")
        members: dict[int, list[int]] = {}
        for i in range(len(sites)):
            members.setdefault(find(i), []).append(i)
        group_of = [0] * len(sites)
        coupled = []
        for index, group in enumerate(members.values()):
            for i in group:
                group_of[i] = index
            reasons = [problems[i] for i in group if i in problems]
            if len({out_features(sites[i][0]) for i in group}) > 1:
                reasons.append("its sites differ in their number of neurons")
            names = tuple(self.names[sites[i][0]] for i in group)
            coupled.append(Group(names, reasons[0] if reasons else ""))
        return group_of, tuple(coupled)


def _walk(start: Node, direction: str) -> list[Node]:
    """Nodes reached from ``start``; the walk does not go through layers."""
    found: list[Node] = []
    seen = {id(start)}
    pending = list(getattr(start, direction))
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        found.append(node)
        if not is_layer(node.module):
            pending.extend(getattr(node, direction))
    return found


def _as_span(indices: list[int], roots: list[int | None], neurons: int) -> tuple[int, int] | None:
    """(start, repeat) such that neuron c has start + c * repeat …, or None if there is none."""
    owned: dict[int, list[int]] = {}
    for index, root in zip(indices, roots, strict=True):
        if root is None:
            return None
        owned.setdefault(root, []).append(index)
    if set(owned) != set(range(neurons)):
        return None
    start, repeat = min(owned[0]), len(owned[0])
    for neuron, own in owned.items():
        first = start + neuron * repeat
        if sorted(own) != list(range(first, first + repeat)):
            return None
    return start, repeat
