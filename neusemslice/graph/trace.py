"""From a model and one batch to its graph.

Four parts find it: what a forward pass shows of layers (layers.py), torch-pruning's graph for
layers whose neurons reach their readers one to one (coupling.py), attentions (attention.py), and
norms that mix neurons on their way (norms.py).
All claims of where neurons arrive are tried on the model (probe.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from neusemslice.graph.attention import find_attentions, find_heads, with_heads
from neusemslice.graph.coupling import with_traced
from neusemslice.graph.dependencies import dependencies
from neusemslice.graph.layers import (
    Call,
    in_features,
    is_depthwise,
    is_layer,
    out_features,
    run_layers,
)
from neusemslice.graph.model import Inputs, device_of, evaluation, fingerprint, uncompiled
from neusemslice.graph.norms import with_norms
from neusemslice.graph.probe import Probe
from neusemslice.graph.removal import find_parts, tried_out
from neusemslice.graph.sharding import same_inputs
from neusemslice.graph.sites import Graph, Layer


def trace(model: nn.Module, inputs: Inputs) -> Graph:
    """Finds the sites of a model by running it on ``inputs``; the model is left as it was.

    Ranks that share a sharded model trace it together, on the inputs of the first of them.

    Raises:
        ValueError: if the model has no layer whose neurons another one reads.
        TypeError: if it returns no logits.
        ImportError: if torch-pruning is not installed.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        uncompiled(),
        evaluation(model, requires_grad=True),
    ):
        inputs = same_inputs(model, inputs).to(device_of(model)).normal()
        run = run_layers(model, inputs)
        calls = run.calls
        probe = Probe(model, inputs, calls, run.norms)
        _note_rows(calls, probe, {inputs.samples, run.answer[0]})
        heads = find_heads(find_attentions(calls), calls, probe)
        names = {module: name for name, module in model.named_modules()}
        graph = Graph(
            fingerprint=fingerprint(model),
            num_outputs=run.answer[-1],
            sites=(),
            groups=(),
            layers=tuple(_layers(calls, names)),
            outputs=(),
            skipped=_weights_without_layer(model),
        )
        try:
            found = dependencies(model, inputs, calls, heads)
        except ImportError:
            raise
        except Exception as error:
            # torch-pruning raises whatever its walk through a model runs into.
            reason = f"torch-pruning cannot trace the model: {type(error).__name__}: {error}"
            skipped = dict.fromkeys((names[layer] for layer in calls), reason)
            graph = replace(graph, skipped={**graph.skipped, **skipped})
        else:
            graph = with_traced(graph, names, calls, found, probe)
        graph = with_heads(graph, heads, find_parts(heads, probe), names, calls)
        graph = tried_out(with_norms(graph, model, names, run, probe), probe)
    if not graph.sites:
        reasons = "".join(f"; {name} is left out: {why}" for name, why in graph.skipped.items())
        raise ValueError(
            f"{type(model).__name__} has no convolution or linear layer whose neurons "
            f"another one reads, so there is nothing to slice{reasons}"
        )
    return graph


def called_layers(model: nn.Module, inputs: Inputs) -> tuple[Layer, ...]:
    """All convolutions and linear layers that a forward pass calls, in the order of their calls.

    Raises:
        TypeError: if the model returns no logits.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        uncompiled(),
        evaluation(model, requires_grad=True),
    ):
        calls = run_layers(model, inputs.to(device_of(model)).normal()).calls
    names = {module: name for name, module in model.named_modules()}
    return tuple(_layers(calls, names))


def _note_rows(calls: dict[nn.Module, Call], probe: Probe, samples: set[int]) -> None:
    """Notes which layers read samples in pieces, and which read something else than samples."""
    pieces = probe.pieces()
    for layer, call in calls.items():
        call.pieces = layer in pieces
        if call.rows not in samples and not call.pieces:
            call.unseen = f"reads {call.rows} rows that are not samples or parts of them"


def _weights_without_layer(model: nn.Module) -> dict[str, str]:
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


def _layers(calls: dict[nn.Module, Call], names: dict[nn.Module, str]) -> list[Layer]:
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
