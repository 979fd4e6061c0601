"""torch-pruning's dependency graph of a model, as this package asks for it.

Attentions with heads are cut out before torch-pruning looks: their neurons do not map one to one,
and in rotary embeddings its search for groups has no end. What feeds an attention becomes an end
of the graph, and what reads it a beginning.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch_pruning
from torch import Tensor, nn
from torch_pruning.dependency.node import Node
from torch_pruning.pruner.function import BasePruningFunc

from neusemslice.graph.attention import IDLE, Attention, Heads, find_attentions, find_heads
from neusemslice.graph.layers import Call, argument, is_layer, is_transposed_linear, run_layers
from neusemslice.graph.model import Inputs, tensors_in
from neusemslice.graph.probe import Probe


def dependency_graph(model: nn.Module, inputs: Inputs) -> torch_pruning.DependencyGraph:
    """torch-pruning's graph of a model whose parameters require gradients.

    It follows every tensor of the output, not only the logits.
    """
    calls = run_layers(model, inputs).calls
    heads = find_heads(find_attentions(calls), calls, Probe(model, inputs, calls))
    return dependencies(model, inputs, calls, heads).graph


@dataclass(frozen=True)
class Dependencies:
    """torch-pruning's graph of a model.

    Attributes:
        graph: the graph.
        roots: the autograd nodes at which it starts: those of the output.
        attending: the layers that feed attentions which were cut out.
    """

    graph: torch_pruning.DependencyGraph
    roots: set[object]
    attending: set[nn.Module]


def dependencies(
    model: nn.Module,
    inputs: Inputs,
    calls: Mapping[nn.Module, Call],
    heads: Mapping[Attention, Heads | str],
) -> Dependencies:
    """Builds torch-pruning's graph, without the attentions that have heads.

    What does not divide into heads may be a pooling whose neurons stay where they are. It is cut
    out only if torch-pruning fails on it.

    Raises:
        Exception: whatever torch-pruning's walk through the model runs into.
    """
    cut = [a for a, answer in heads.items() if isinstance(answer, Heads) or answer == IDLE]
    try:
        return _build(model, inputs, calls, cut)
    except Exception:
        if len(cut) == len(heads):
            raise
        return _build(model, inputs, calls, heads)


def _build(
    model: nn.Module,
    inputs: Inputs,
    calls: Mapping[nn.Module, Call],
    attentions: Collection[Attention],
) -> Dependencies:
    graph = _BoundedGraph()
    roots: set[object] = set()
    ends: list[Tensor] = []

    def differentiable(output: object) -> list[Tensor]:
        found = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        roots.update(tensor.grad_fn for tensor in found)
        return found + ends

    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(_no_hooks_left(model))
        for attention in attentions:
            cut = attention.reader.register_forward_pre_hook(_begin, with_kwargs=True)
            stack.callback(cut.remove)
            for source in attention.sources:
                end = source.register_forward_hook(lambda _, __, output: ends.append(output))
                stack.callback(end.remove)
        graph.build_dependency(
            model,
            example_inputs=inputs,
            forward_fn=lambda module, batch: batch.run(module),
            output_transform=differentiable,
            customized_pruners={
                type(module): _TransposedLinearPruner()
                for module in model.modules()
                if is_transposed_linear(module)
            },
            # It expects one tensor from every layer that it knows.
            ignored_layers=[m for m in model.modules() if is_layer(m) and m not in calls],
            verbose=False,
        )
    attending = {source for attention in attentions for source in attention.sources}
    return Dependencies(graph, roots, attending)


@contextmanager
def _no_hooks_left(model: nn.Module) -> Iterator[None]:
    """Removes the hooks that torch-pruning leaves behind when it fails."""
    before = [(module, set(module._forward_hooks)) for module in model.modules()]
    try:
        yield
    finally:
        for module, own in before:
            for key in set(module._forward_hooks) - own:
                del module._forward_hooks[key]


def _begin(
    reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (argument(args, kwargs).detach().requires_grad_(), *args[1:]), {}


class _BoundedGraph(torch_pruning.DependencyGraph):  # type: ignore[misc]
    """A graph whose search for a group ends.

    torch-pruning looks at an operation again for each list of indices with which it gets there,
    and an operation that permutes features always gives another one. In networks that it
    understands, a search looks at fewer operations than the graph has edges.
    """

    def _build_dependency(self, module2node: dict[object, Node]) -> None:
        super()._build_dependency(module2node)
        self.looks = 0
        self.allowed = 500 + 3 * sum(len(node.dependencies) for node in module2node.values())
        for node in module2node.values():
            node.dependencies = _Counted(node.dependencies, self)

    def get_pruning_group(self, *arguments: Any, **options: Any) -> Any:
        self.looks = 0
        return super().get_pruning_group(*arguments, **options)


class _Counted(list[Any]):
    """What an operation depends on; counts how often that is looked at."""

    def __init__(self, items: Iterable[Any], graph: _BoundedGraph) -> None:
        super().__init__(items)
        self.graph = graph

    def __iter__(self) -> Iterator[Any]:
        self.graph.looks += 1
        if self.graph.looks > self.graph.allowed:
            raise RuntimeError("the search does not end")
        return super().__iter__()


class _TransposedLinearPruner(BasePruningFunc):  # type: ignore[misc]
    """How torch-pruning cuts a linear layer whose weight is [in, out]."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        kept = sorted(set(range(self.get_out_channels(layer))) - set(idxs))
        layer.nf = len(kept)
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 1)
        if layer.bias is not None:
            layer.bias = self._prune_parameter_and_grad(layer.bias, kept, 0)
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        kept = sorted(set(range(self.get_in_channels(layer))) - set(idxs))
        layer.nx = len(kept)
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.nf)

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.nx)
