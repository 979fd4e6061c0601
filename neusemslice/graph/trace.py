"""From a model and one batch to its graph.

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

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch_pruning.dependency.node import Node

from neusemslice.graph.model import (
    Inputs,
    device_of,
    evaluation,
    fingerprint,
    logits_of,
    tensors_in,
    uncompiled,
)
from neusemslice.graph.probe import Probe, mixes_neurons
from neusemslice.graph.sharding import same_inputs
from neusemslice.graph.sites import Graph, Group, Layer, Reader, Site, Span

_LAYERS = (_ConvNd, nn.Linear)


@dataclass
class _Call:
    """What one forward pass showed of a layer.

    ``problem`` says why its neurons cannot be told apart from others; empty where they can.
    """

    order: int
    count: int = 0
    positions: int = 0
    problem: str = ""


@dataclass
class _Group:
    """torch-pruning's answer for all output channels of one producer."""

    # Other layers' outputs, readers' inputs and norms, each with where the producer's channels are.
    outputs: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)
    inputs: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)
    norms: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)
    problem: str = ""


def dependency_graph(model: nn.Module, inputs: Inputs) -> torch_pruning.DependencyGraph:
    """torch-pruning's graph of a model whose parameters require gradients.

    It follows every tensor of the output, not only the logits.
    """
    return _dependencies(model, inputs)[0]


def _dependencies(
    model: nn.Module, inputs: Inputs
) -> tuple[torch_pruning.DependencyGraph, set[object]]:
    """torch-pruning's graph, and the autograd nodes at which it starts: those of the output."""
    graph = torch_pruning.DependencyGraph()
    roots: set[object] = set()

    def differentiable(output: object) -> list[Tensor]:
        found = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        roots.update(tensor.grad_fn for tensor in found)
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(
            model,
            example_inputs=inputs,
            forward_fn=lambda module, batch: batch.run(module),
            output_transform=differentiable,
            verbose=False,
        )
    return graph, roots


def trace(model: nn.Module, inputs: Inputs) -> Graph:
    """Finds the sites of a model by running it on ``inputs``; the model is left as it was.

    Ranks that share a sharded model trace it together, on the inputs of the first of them.

    Raises:
        ValueError: if the model has no convolution or linear layer that another one reads.
        TypeError: if it returns no logits.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        uncompiled(),
        evaluation(model, requires_grad=True),
    ):
        inputs = same_inputs(model, inputs).to(device_of(model)).normal()
        calls, num_outputs = _run(model, inputs)
        dependencies, roots = _dependencies(model, inputs)
        probe = Probe(model, inputs, {layer: _out_features(layer) for layer in calls})
        return _Tracer(model, calls, num_outputs, dependencies, roots, probe).graph()


def _run(model: nn.Module, inputs: Inputs) -> tuple[dict[nn.Module, _Call], int]:
    calls: dict[nn.Module, _Call] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        call = calls.setdefault(module, _Call(len(calls)))
        call.count += 1
        # A transposed convolution applies its weight once per position of its input.
        counted = args[0] if isinstance(module, _ConvTransposeNd) else output
        dim = 1 if isinstance(module, _ConvNd) else -1
        call.positions += counted.numel() // max(1, counted.shape[0] * counted.shape[dim])

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, _LAYERS)]
    try:
        output = logits_of(inputs.run(model))
    finally:
        for handle in handles:
            handle.remove()
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for module, call in calls.items():
        if call.count > 1:
            call.problem = "is used more than once in a forward pass"
        elif "weight" not in module._parameters:
            call.problem = "has a parametrized weight"
        elif any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
            call.problem = "shares a parameter with another module"
    return calls, output.shape[-1]


def _out_features(module: nn.Module) -> int:
    return module.out_channels if isinstance(module, _ConvNd) else int(module.out_features)  # type: ignore[arg-type]


def _in_features(module: nn.Module) -> int:
    return module.in_channels if isinstance(module, _ConvNd) else int(module.in_features)  # type: ignore[arg-type]


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, _ConvNd)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups > 1 and not _is_depthwise(module)


def _weight_dims(module: nn.Module) -> tuple[int, int]:
    """Dimensions of the weight that hold its outputs and its inputs."""
    return (1, 0) if isinstance(module, _ConvTransposeNd) else (0, 1)


class _Tracer:
    def __init__(
        self,
        model: nn.Module,
        calls: dict[nn.Module, _Call],
        num_outputs: int,
        dependencies: torch_pruning.DependencyGraph,
        roots: set[object],
        probe: Probe,
    ) -> None:
        self.model = model
        self.roots = roots
        self.probe = probe
        self.calls = calls
        self.num_outputs = num_outputs
        self.dependencies = dependencies
        self.names = {module: name for name, module in model.named_modules()}
        self.nodes: dict[object, Node] = dependencies.module2node
        self.skipped: dict[str, str] = {}

    def graph(self) -> Graph:
        producers = sorted(
            (m for m in self.calls if m in self.nodes), key=lambda m: self.calls[m].order
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
        sites = self._sites(first_reader, groups)
        if not sites:
            raise ValueError(
                f"{type(self.model).__name__} has no convolution or linear layer whose neurons "
                "another one reads, so there is nothing to slice"
            )
        return self._assemble(sites, groups, outputs)

    def _group(self, producer: nn.Module) -> _Group:
        """Reads torch-pruning's group, turning its index lists into (start, repeat)."""
        prune = self.dependencies.get_pruner_of_module(producer).prune_out_channels
        items = self.dependencies.get_pruning_group(
            producer, prune, list(range(_out_features(producer)))
        )
        group = _Group()
        for item in items:
            module, handler = item.dep.target.module, item.dep.handler
            if module is producer or not isinstance(module, nn.Module):
                continue
            if module not in self.names:
                continue  # an operation, not a module: nothing of it is stored
            neurons = _out_features(producer)
            span = _as_span(item.idxs, item.root_idxs, neurons)
            is_output = self.dependencies.is_out_channel_pruning_fn(handler)
            if isinstance(module, _LAYERS):
                self._add_layer(group, producer, module, span, is_output)
            elif span is not None and isinstance(module, _NormBase):
                group.norms[module] = span
            elif mixes_neurons(module) or any(True for _ in module.parameters(recurse=False)):
                kind_name = type(module).__name__
                group.problem = f"{self.names[module]} ({kind_name}) mixes or transforms neurons"
        if _is_grouped(producer):
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
        name, neurons = self.names[module], _out_features(producer)
        reads = not is_output or _is_depthwise(module)
        if span is None or (reads and neurons * span[1] + span[0] > _in_features(module)):
            group.problem = f"its neurons do not map one to one to {name}"
            if reads and neurons == _in_features(module):
                # The map went astray elsewhere in the group; a reader of as many features as the
                # producer has neurons can still be observed, though nothing may be removed.
                group.inputs[module] = (0, 1)
            return
        if is_output or _is_depthwise(module):
            group.outputs[module] = span
            if span != (0, 1) or _out_features(module) != neurons:
                group.problem = f"it shares only a part of {name}'s neurons"
        if reads:
            group.inputs[module] = span
        if _is_grouped(module):
            group.problem = f"{name} is a grouped convolution"

    def _downstream(self, producer: nn.Module) -> list[nn.Module]:
        """Layers that read the producer's output without another layer in between."""
        return [n.module for n in _walk(self.nodes[producer], "outputs") if _is_layer(n)]

    def _upstream(self, module: nn.Module) -> list[nn.Module]:
        """Layers whose output the module reads without another layer in between."""
        return [n.module for n in _walk(self.nodes[module], "inputs") if _is_layer(n)]

    def _reaches_output(self, producer: nn.Module) -> bool:
        node = self.nodes[producer]
        passed = [node, *(n for n in _walk(node, "outputs") if not _is_layer(n))]
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
            span = groups[producer].inputs[reader]
            # Readers of one tensor are one place: they have the same predecessor in the graph.
            width = _out_features(producer)
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
                dim = 1 if isinstance(module, _ConvNd) else -1
                readers[i].append(Reader(self.names[module], dim, start, repeat))
                if not _is_depthwise(module):
                    weight = f"{self.names[module]}.weight"
                    columns[i].append(Span(weight, _weight_dims(module)[1], start, repeat))
        rows = [self._rows(producers) for producers in sites]
        norms = {norm for group in groups.values() for norm in group.norms}
        for norm in sorted(norms, key=lambda m: self.names[m]):
            for i, (start, repeat) in self._governors(norm, site_of, groups, "norms"):
                rows[i] += [
                    Span(f"{self.names[norm]}.{tensor}", 0, start, repeat)
                    for tensor in ("weight", "bias", "running_mean", "running_var")
                    if getattr(norm, tensor) is not None
                ]
        group_of, coupled = self._couple(sites, site_of, groups)
        return Graph(
            fingerprint=fingerprint(self.model),
            num_outputs=self.num_outputs,
            sites=tuple(
                Site(
                    name=self.names[producers[0]],
                    neurons=_out_features(producers[0]),
                    group=group_of[i],
                    producers=tuple(self.names[p] for p in producers),
                    readers=tuple(readers[i]),
                    rows=tuple(rows[i]),
                    columns=tuple(columns[i]),
                )
                for i, producers in enumerate(sites)
            ),
            groups=coupled,
            layers=tuple(self._layers()),
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
            span = getattr(groups[producer], kind).get(module)
            if span is not None and producer in site_of:
                last[span] = max(last.get(span, -1), site_of[producer])
        return sorted((i, span) for span, i in last.items())

    def _rows(self, producers: Iterable[nn.Module]) -> list[Span]:
        spans = []
        for producer in producers:
            name = self.names[producer]
            spans.append(Span(f"{name}.weight", _weight_dims(producer)[0]))
            if producer.bias is not None:
                spans.append(Span(f"{name}.bias", 0))
        return spans

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
            if len({_out_features(sites[i][0]) for i in group}) > 1:
                reasons.append("its sites differ in their number of neurons")
            names = tuple(self.names[sites[i][0]] for i in group)
            coupled.append(Group(names, reasons[0] if reasons else ""))
        return group_of, tuple(coupled)

    def _layers(self) -> list[Layer]:
        layers = []
        for module, call in sorted(self.calls.items(), key=lambda item: item[1].order):
            weight = module.weight
            assert isinstance(weight, Tensor)
            layers.append(
                Layer(
                    name=self.names[module],
                    inputs=_in_features(module),
                    outputs=_out_features(module),
                    macs=weight.numel() * call.positions,
                    depthwise=_is_depthwise(module),
                )
            )
        return layers


def _is_layer(node: Node) -> bool:
    return isinstance(node.module, _LAYERS)


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
        if not _is_layer(node):
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
