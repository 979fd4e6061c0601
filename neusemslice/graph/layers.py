"""Layers: the modules whose output features are neurons, and what a forward pass shows of them.

A layer is a convolution, a linear layer, or a linear layer that stores its weight as [in, out], as
transformers' GPT-2 does. The last is recognised by what it has, so transformers is not needed here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from neusemslice.graph.experts import Routing, watch
from neusemslice.graph.model import Inputs, logits_of, tensors_in
from neusemslice.graph.sites import Layer, Span


@dataclass
class Call:
    """What one forward pass showed of a layer.

    Attributes:
        order: in which layers were first called.
        count: how often.
        positions: at which the weight was applied, per sample.
        rows: size of the first dimension of what it reads.
        pieces: whether several rows belong to one sample, next to each other.
        reads: the autograd nodes of what it read, one per call; ``None`` for a leaf.
        writes: those of its outputs.
        problem: why its neurons cannot be told apart from others; empty where they can.
        unseen: why the neurons that it reads cannot be observed there; empty where they can.
    """

    order: int
    count: int = 0
    positions: int = 0
    rows: int = 0
    pieces: bool = False
    reads: list[Any] = field(default_factory=list)
    writes: list[Any] = field(default_factory=list)
    problem: str = ""
    unseen: str = ""


_MIXING_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Run:
    """What one forward pass showed.

    Attributes:
        calls: of the layers, except those whose output is not one tensor.
        norms: of the norms that mix neurons.
        answer: the shape of the logits.
        roots: the autograd nodes of all tensors of the output.
        experts: of the modules of fused experts.
    """

    calls: dict[nn.Module, Call]
    norms: dict[nn.Module, Call]
    answer: torch.Size
    roots: list[Any]
    experts: dict[nn.Module, Routing]


def run_layers(model: nn.Module, inputs: Inputs) -> Run:
    """Runs a model whose parameters require gradients.

    Raises:
        TypeError: if it returns no logits.
    """
    calls: dict[nn.Module, Call] = {}
    norms: dict[nn.Module, Call] = {}

    def note_norm(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        if args and isinstance(output, Tensor) and output.shape == args[0].shape:
            call = norms.setdefault(module, Call(len(norms)))
            call.count += 1
            call.reads.append(args[0].grad_fn)

    def note(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        if not isinstance(output, Tensor):
            return
        call = calls.setdefault(module, Call(len(calls)))
        call.count += 1
        x = argument(args, kwargs)
        call.rows = x.shape[0]
        call.reads.append(x.grad_fn)
        call.writes.append(output.grad_fn)
        # A transposed convolution applies its weight once per position of its input.
        counted = x if isinstance(module, _ConvTransposeNd) else output
        call.positions += counted.numel() // max(
            1, counted.shape[0] * counted.shape[dim_of(module)]
        )

    handles = [
        m.register_forward_hook(note, with_kwargs=True) for m in model.modules() if is_layer(m)
    ]
    handles += [m.register_forward_hook(note_norm) for m in model.modules() if mixes_neurons(m)]
    experts = watch(model, calls)
    handles += experts.handles
    try:
        output = inputs.run(model)
        answer = logits_of(output).shape
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
    roots = [tensor.grad_fn for tensor in tensors_in(output)]
    return Run(calls, norms, answer, roots, experts.found)


def argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer was called with, in a hook that sees its arguments."""
    x = args[0] if args else kwargs["input"]
    assert isinstance(x, Tensor)
    return x


def is_layer(module: object) -> bool:
    """Whether its output features are neurons."""
    return isinstance(module, (_ConvNd, nn.Linear)) or is_transposed_linear(module)


def mixes_neurons(module: nn.Module) -> bool:
    """Whether it is a norm over several neurons: those of transformers go by many names."""
    return isinstance(module, _MIXING_NORMS) or type(module).__name__.endswith(
        ("RMSNorm", "LayerNorm")
    )


def is_transposed_linear(module: object) -> bool:
    """Whether it is a linear layer with ``nx`` inputs, ``nf`` outputs and a weight [nx, nf]."""
    if not isinstance(module, nn.Module):
        return False
    weight = getattr(module, "weight", None)
    sizes = [getattr(module, "nx", None), getattr(module, "nf", None)]
    return isinstance(weight, Tensor) and list(weight.shape) == sizes


def dim_of(layer: nn.Module) -> int:
    """The dimension of a layer's or norm's input and output that holds the neurons."""
    if isinstance(layer, (_ConvNd, nn.GroupNorm)):
        return 1
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return -len(layer.normalized_shape)
    # Norms of one's own over the channels of an image name their layout as ConvNeXt's does.
    return 1 if getattr(layer, "data_format", "") == "channels_first" else -1


def out_features(layer: nn.Module) -> int:
    """Number of its output neurons."""
    if isinstance(layer, _ConvNd):
        return layer.out_channels
    return int(layer.nf if is_transposed_linear(layer) else layer.out_features)  # type: ignore[arg-type]


def in_features(layer: nn.Module) -> int:
    """Number of its input neurons."""
    if isinstance(layer, _ConvNd):
        return layer.in_channels
    return int(layer.nx if is_transposed_linear(layer) else layer.in_features)  # type: ignore[arg-type]


def weight_dims(layer: nn.Module) -> tuple[int, int]:
    """Dimensions of the weight that hold its outputs and its inputs.

    A depthwise convolution's neurons are both at once, and lie in the first.
    """
    turned = isinstance(layer, _ConvTransposeNd) and not is_depthwise(layer)
    turned = turned or is_transposed_linear(layer)
    return (1, 0) if turned else (0, 1)


def rows_of(layer: nn.Module, name: str, start: int = 0, repeat: int = 1) -> list[Span]:
    """What neurons own of the layer that makes them."""
    spans = [Span(f"{name}.weight", weight_dims(layer)[0], start, repeat)]
    if layer.bias is not None:
        spans.append(Span(f"{name}.bias", 0, start, repeat))
    return spans


def norm_rows(norm: nn.Module, name: str, start: int = 0, repeat: int = 1) -> list[Span]:
    """What neurons own of a batch or instance norm that they pass."""
    return [
        Span(f"{name}.{tensor}", 0, start, repeat)
        for tensor in ("weight", "bias", "running_mean", "running_var")
        if getattr(norm, tensor) is not None
    ]


def is_depthwise(module: nn.Module) -> bool:
    """Whether each of its neurons reads only its own predecessor."""
    return (
        isinstance(module, _ConvNd)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def is_grouped(module: nn.Module) -> bool:
    """Whether its neurons read groups of predecessors."""
    return isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module)


def weights_without_layer(model: nn.Module) -> dict[str, str]:
    """Modules whose neurons nobody can observe, because no layer computes with their weights."""
    skipped = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            skipped[name] = "its heads are computed without a call of its output projection"
        elif not is_layer(module) and not isinstance(module, ParametrizationList):
            stacked = [
                f"{weight} {list(p.shape)}"
                for weight, p in module.named_parameters(recurse=False)
                if p.ndim == 3 and min(p.shape) > 1
            ]
            if stacked:
                skipped[name] = f"its weights {', '.join(stacked)} are not those of a layer"
    return skipped


def as_layers(calls: dict[nn.Module, Call], names: dict[nn.Module, str]) -> list[Layer]:
    layers = []
    for module, call in sorted(calls.items(), key=lambda item: item[1].order):
        weight = module.weight
        assert isinstance(weight, Tensor)
        layers.append(
            Layer(
                name=names[module],
                inputs=in_features(module),
                outputs=out_features(module),
                macs=weight.numel() * call.positions,
                depthwise=is_depthwise(module),
            )
        )
    return layers
