"""Do a producer's neurons arrive at a reader where the graph says they do?

The question is put to the model itself. Every layer's output is replaced by what it was in a plain
run, with some of its neurons moved; so a change that a reader sees comes from the layers right
before it and not from further up. What changes must lie within the features that belong to the
moved neurons. A transpose, a shuffle, attention or a norm called as a function moves others, and
gives the wrong map away. Norm modules that mix neurons are passed through for the run, since they
keep each neuron in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from neusemslice.graph.model import Inputs

_MIXING_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

Spans = Mapping[nn.Module, Mapping[nn.Module, tuple[int, int]]]
"""For each producer and reader: (start, repeat) of the producer's neurons in the reader's input."""


class Probe:
    """Runs a model in evaluation mode with neurons moved.

    Args:
        layers: convolutions and linear layers of the model.
        neurons: of each layer's output.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, neurons: Mapping[nn.Module, int]) -> None:
        self.model = model
        self.inputs = inputs
        self.neurons = neurons
        self.outputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in neurons}
        self.plain = self._run(self._keep)
        self.generator = torch.Generator().manual_seed(0)

    def wrong(self, spans: Spans) -> set[tuple[nn.Module, nn.Module]]:
        """The pairs of producer and reader whose neurons do not arrive as their span says."""
        suspects = self._suspects(spans, spans)
        pairs = {
            (producer, reader)
            for producer, readers in spans.items()
            for reader in readers
            if reader in suspects
        }
        if not pairs:
            return set()
        # Several producers of one reader were moved at once; now one by one, to find which it is.
        return {
            (producer, reader)
            for producer in {producer for producer, _ in pairs}
            for reader in self._suspects(spans, {producer: spans[producer]})
            if (producer, reader) in pairs
        }

    def _suspects(self, spans: Spans, moved: Spans) -> set[nn.Module]:
        """Readers that see a change outside the features of the moved neurons."""
        half = {
            producer: torch.rand(self.neurons[producer], generator=self.generator) < 0.5
            for producer in moved
        }
        suspects: set[nn.Module] = set()
        for chosen in (half, {producer: ~mask for producer, mask in half.items()}):
            allowed: dict[nn.Module, Tensor] = {}
            for producer, mask in chosen.items():
                for reader, (start, repeat) in moved[producer].items():
                    if reader not in self.plain:
                        continue
                    size = self.plain[reader].shape[_feature_dim(reader, self.plain[reader])]
                    features = allowed.setdefault(reader, torch.zeros(size, dtype=torch.bool))
                    part = mask.repeat_interleave(repeat)[: max(0, size - start)]
                    features[start : start + len(part)] |= part
            # Up and down, because a neuron behind a ReLU may only be seen to rise.
            for step in (1.0, -1.0):
                seen = self._run(functools.partial(self._move, chosen=chosen, step=step))
                for reader, features in allowed.items():
                    if _changes_others(reader, self.plain[reader], seen.get(reader), features):
                        suspects.add(reader)
        return suspects

    def _keep(self, layer: nn.Module, output: Tensor) -> Tensor:
        self.outputs[layer].append(output)
        return output

    def _move(
        self, layer: nn.Module, output: Tensor, chosen: Mapping[nn.Module, Tensor], step: float
    ) -> Tensor:
        plain = self.outputs[layer][0] if len(self.outputs[layer]) == 1 else output
        mask = chosen.get(layer)
        if mask is None:
            return plain
        dim = 1 if isinstance(layer, _ConvNd) else -1
        shape = [1] * plain.ndim
        shape[dim] = -1
        distance = step * (1 + plain.nan_to_num(0, 0, 0).abs().amax())
        return plain + distance * mask.to(plain.device, plain.dtype).view(shape)

    def _run(self, replace: Callable[[nn.Module, Tensor], Tensor]) -> dict[nn.Module, Tensor]:
        """What each layer reads, when its output is what ``replace`` makes of it."""
        read: dict[nn.Module, Tensor] = {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read[module] = (args[0] if args else kwargs["input"]).clone()

        def after(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            return replace(module, output)

        def through(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return args[0] if args else output

        with ExitStack() as stack, torch.no_grad():
            for module in self.model.modules():
                if module in self.neurons:
                    pre = module.register_forward_pre_hook(before, with_kwargs=True)
                    post = module.register_forward_hook(after, with_kwargs=True)
                    stack.callback(pre.remove)
                    stack.callback(post.remove)
                elif mixes_neurons(module):
                    stack.callback(module.register_forward_hook(through).remove)
            self.inputs.run(self.model)
        return read


def _changes_others(
    reader: nn.Module, before: Tensor, after: Tensor | None, features: Tensor
) -> bool:
    """Whether anything but ``features`` of what a reader reads is different."""
    if after is None or after.shape != before.shape:
        return True
    same = (before == after) | (before.isnan() & after.isnan())
    dim = _feature_dim(reader, before)
    changed = (~same).movedim(dim, -1).flatten(0, -2).any(0).cpu()
    return bool((changed & ~features).any())


def mixes_neurons(module: nn.Module) -> bool:
    """Whether it is a norm over several neurons: those of transformers go by many names."""
    return isinstance(module, _MIXING_NORMS) or type(module).__name__.endswith(
        ("RMSNorm", "LayerNorm")
    )


def _feature_dim(layer: nn.Module, x: Tensor) -> int:
    return 1 if isinstance(layer, _ConvNd) else x.ndim - 1
