"""From a model and one batch to its graph.

Four parts find it: what a forward pass shows of layers (layers.py), torch-pruning's graph for
layers whose neurons reach their readers one to one (coupling.py), attentions (attention.py), and
norms that mix neurons on their way (norms.py). All claims of where neurons arrive (probe.py) and of
what can be removed (removal.py) are tried on the model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from neusemslice.graph.attention import find_attentions, find_heads, with_heads
from neusemslice.graph.blocks import structure
from neusemslice.graph.coupling import with_traced
from neusemslice.graph.dependencies import dependencies
from neusemslice.graph.experts import expert_macs, with_experts
from neusemslice.graph.layers import Call, as_layers, run_layers, weights_without_layer
from neusemslice.graph.model import Inputs, device_of, evaluation, fingerprint, uncompiled
from neusemslice.graph.norms import with_norms
from neusemslice.graph.probe import Probe
from neusemslice.graph.removal import find_parts, tried_out
from neusemslice.graph.sharding import same_inputs
from neusemslice.graph.sites import Graph

LARGE = 10**9
"""Parameters from which on a model is read by structure."""


def trace(model: nn.Module, inputs: Inputs) -> Graph:
    """Finds the sites of a model by running it on ``inputs``; the model is left as it was.

    A model on the meta device has no values to run on, and one with more than ``LARGE`` parameters
    would take minutes: these are read by structure (blocks.py), which finds MLPs and the heads of
    known attentions, and nothing in residual streams.

    Ranks that share a sharded model trace it together, on the inputs of the first of them.

    Raises:
        ValueError: if the model has no layer whose neurons another one reads.
        TypeError: if it returns no logits.
        ImportError: if torch-pruning is not installed.
    """
    if _by_structure(model):
        return _with_sites(structure(model, inputs), model)
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
            layers=tuple(as_layers(calls, names)),
            outputs=(),
            skipped=weights_without_layer(model),
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
        graph = with_experts(graph, names, run.experts, inputs.samples)
    return _with_sites(graph, model)


def _by_structure(model: nn.Module) -> bool:
    parameters = list(model.parameters())
    return any(p.is_meta for p in parameters) or sum(p.numel() for p in parameters) > LARGE


def _with_sites(graph: Graph, model: nn.Module) -> Graph:
    """The graph, which must have sites."""
    if not graph.sites:
        reasons = "".join(f"; {name} is left out: {why}" for name, why in graph.skipped.items())
        raise ValueError(
            f"{type(model).__name__} has no convolution or linear layer whose neurons "
            f"another one reads, so there is nothing to slice{reasons}"
        )
    return graph


def multiply_adds(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-adds of convolutions, linear layers and fused experts for one sample.

    Raises:
        TypeError: if the model returns no logits.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        uncompiled(),
        evaluation(model, requires_grad=True),
    ):
        run = run_layers(model, inputs.to(device_of(model)).normal())
    layers = as_layers(run.calls, dict.fromkeys(run.calls, ""))
    return sum(layer.macs for layer in layers) + expert_macs(run.experts, inputs.samples)


def _note_rows(calls: dict[nn.Module, Call], probe: Probe, samples: set[int]) -> None:
    """Notes which layers read samples in pieces, and which read something else than samples."""
    pieces = probe.pieces()
    for layer, call in calls.items():
        call.pieces = layer in pieces
        if call.rows not in samples and not call.pieces:
            call.unseen = f"reads {call.rows} rows that are not samples or parts of them"
