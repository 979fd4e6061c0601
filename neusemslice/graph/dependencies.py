"""torch-pruning's dependency graph of a model, as this package asks for it.

Attentions are cut out before torch-pruning looks: their neurons do not map one to one, and in
rotary embeddings its search for groups takes a time that grows exponentially. What feeds an
attention becomes an end of the graph, and what reads it a beginning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch_pruning
from torch import Tensor, nn
from torch_pruning.pruner.function import BasePruningFunc

from neusemslice.graph.attention import Attention, find_attentions
from neusemslice.graph.layers import argument, is_transposed_linear, run_layers
from neusemslice.graph.model import Inputs, tensors_in


def dependency_graph(model: nn.Module, inputs: Inputs) -> torch_pruning.DependencyGraph:
    """torch-pruning's graph of a model whose parameters require gradients.

    It follows every tensor of the output, not only the logits.
    """
    return dependencies(model, inputs, find_attentions(run_layers(model, inputs)[0]))[0]


def dependencies(
    model: nn.Module, inputs: Inputs, attentions: Iterable[Attention]
) -> tuple[torch_pruning.DependencyGraph, set[object]]:
    """torch-pruning's graph, and the autograd nodes at which it starts: those of the output."""
    graph = torch_pruning.DependencyGraph()
    roots: set[object] = set()
    ends: list[Tensor] = []

    def differentiable(output: object) -> list[Tensor]:
        found = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        roots.update(tensor.grad_fn for tensor in found)
        return found + ends

    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
            verbose=False,
        )
    return graph, roots


def _begin(
    reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (argument(args, kwargs).detach().requires_grad_(), *args[1:]), {}


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
