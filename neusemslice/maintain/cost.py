"""What a model costs: parameters, multiply-adds, latency; also of a slice that is not cut yet."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from neusemslice.graph import Graph, Inputs, device_of, evaluation, multiply_adds
from neusemslice.slicing import Slice


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    Attributes:
        parameters: number of them.
        macs: multiply-adds of convolutions, linear layers and fused experts for one sample.
        latency: seconds of one forward pass over the batch it was measured with.
    """

    parameters: int
    macs: int
    latency: float


def parameter_count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def measure(model: nn.Module, inputs: Inputs) -> Cost:
    """Counts parameters and multiply-adds and measures latency on ``inputs``."""
    return Cost(
        parameter_count(model),
        multiply_adds(model, inputs.head(2)),
        latency(model, inputs),
    )


def latency(model: nn.Module, inputs: Inputs, seconds: float = 0.3) -> float:
    """Median seconds of a forward pass in evaluation mode, over at least 10 after 3 of warm-up."""
    device = device_of(model)
    inputs = inputs.to(device)

    def run() -> float:
        begin = time.perf_counter()
        inputs.run(model)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    with evaluation(model), torch.no_grad():
        for _ in range(3):
            run()
        times: list[float] = []
        while len(times) < 10 or sum(times) < seconds:
            times.append(run())
    return statistics.median(times)


def sliced_cost(model: nn.Module, graph: Graph, kept: Slice) -> tuple[int, int]:
    """Parameters and multiply-adds that would be left if only ``kept`` stayed.

    Every tensor shrinks along the dimensions in which its neurons lie; a layer's multiply-adds
    shrink with its weight.
    """
    removed: dict[tuple[str, int], int] = defaultdict(int)
    for site in graph.sites:
        gone = site.neurons - int(kept.mask(site.name).sum())
        for span in (*site.rows, *site.columns):
            removed[span.tensor, span.dim] += gone * span.repeat
    sizes = {
        name: math.prod(size - removed[name, dim] for dim, size in enumerate(parameter.shape))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    macs = graph.expert_macs
    for layer in graph.layers:
        weight = f"{layer.name}.weight"
        macs += layer.macs * sizes[weight] // max(1, model.get_parameter(weight).numel())
    return sum(sizes[name] for name, _ in model.named_parameters()), macs
