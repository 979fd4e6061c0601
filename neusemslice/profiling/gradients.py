"""What gradients of activations need of autograd: where they begin, and what is kept for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.graph import Graph


def in_backward() -> bool:
    """Whether autograd is running, so that a forward pass is one of a checkpointed part again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def first_modules(model: nn.Module, graph: Graph) -> Iterator[nn.Module]:
    """The modules at whose outputs gradients can begin: layers and embeddings.

    Every site lies behind a layer; embeddings are where a model without gradients before them
    would enter a reentrant checkpoint, which passes on no others.
    """
    layers = {layer.name for layer in graph.layers}
    layers.update(name for site in graph.sites for name in site.producers)
    for name, module in model.named_modules():
        if name in layers or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield module


def start_gradients(output: Any, anchor: Tensor) -> Tensor | None:
    """A layer's output that requires gradients, where it does not yet; None where it need not.

    The output depends on the anchor then, whose own gradient is never computed. It stays the same
    tensor, so that the model may write into it; a view, which may be one of a parameter, does not.
    """
    if not isinstance(output, Tensor) or output.requires_grad or not output.is_floating_point():
        return None
    in_place = torch.compiler.is_compiling() or not output._is_view()
    started: Tensor = _Start.apply(output, anchor, in_place)  # type: ignore[no-untyped-call]
    return started


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, in_place: bool) -> Tensor:
        if not in_place:
            return output.view_as(output)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        return None, None, None


class Kept:
    """An activation that is kept for the backward pass as autograd keeps what it saves.

    So it is not kept where a checkpoint computes it again, and taking it raises if it has been
    written into since.
    """

    def __init__(self, x: Tensor, anchor: Tensor) -> None:
        self._saved: Any = None
        self._x: Tensor | None = None
        if torch.compiler.is_compiling():
            # The compiler decides what its backward graph keeps.
            self._x = x
        else:
            with torch.enable_grad():
                self._saved = _Save.apply(x, anchor).grad_fn  # type: ignore[no-untyped-call]

    def take(self) -> Tensor:
        """The activation, which is kept no longer.

        Raises:
            ValueError: if it was taken before.
        """
        if self._x is not None:
            return self._x
        if self._saved is None:
            raise ValueError(
                "profile: a batch with the metric 'taylor' can have one backward pass; "
                "add the losses"
            )
        x: Tensor = self._saved.saved_tensors[0]
        self._saved = None
        return x


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None
