"""torch-pruning's dependency graph of a model, as this package asks for it.

Attentions with heads are cut out before torch-pruning looks: their neurons do not map one to one,
and in rotary embeddings its search for groups has no end. What feeds an attention becomes an end
of the graph, and what reads it a beginning.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from neusemslice.graph.attention import IDLE, Attention, Heads
from neusemslice.graph.layers import Call, argument, is_layer, is_transposed_linear
from neusemslice.graph.model import Inputs, tensors_in

if TYPE_CHECKING:
    import torch_pruning


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

    It follows every tensor of the output, not only the logits.
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
    # Only here, so that all that traces no model works without torch-pruning.
    try:
        from neusemslice.graph.pruning_graph import BoundedGraph, TransposedLinearPruner
    except ImportError as error:
        raise ImportError(
            f"tracing a model needs torch-pruning, which is not installed: {error}"
        ) from error

    graph = BoundedGraph()
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
                type(module): TransposedLinearPruner()
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
