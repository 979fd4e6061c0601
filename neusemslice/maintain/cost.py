"""What a model costs: size, multiply-adds, latency, memory; also of a slice not cut yet."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neusemslice.graph import Graph, Inputs, device_of, evaluation, multiply_adds
from neusemslice.slicing import Slice

BATCH_SIZES = (1, 64)
"""Those that latency is measured with."""

SECONDS = 0.15
"""Of each batch size so long at least."""


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    Attributes:
        parameters: number of them.
        macs: multiply-adds of convolutions, linear layers and fused experts for one sample.
        latency: seconds of a forward pass, by the size of the batch.
        model_bytes: of parameters and buffers.
        activation_bytes: the most that tensors between its operations take in a forward pass of
            one sample, its input included. What an operation uses inside itself is not counted.
    """

    parameters: int
    macs: int
    latency: Mapping[int, float]
    model_bytes: int
    activation_bytes: int

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Cost:
        """The inverse of ``dataclasses.asdict`` and JSON, which has no numbers as keys."""
        return cls(**dict(raw) | {"latency": {int(n): float(s) for n, s in raw["latency"].items()}})


def parameter_count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def measure(model: nn.Module, inputs: Inputs) -> Cost:
    """Counts and measures what a model costs; its samples are those of ``inputs``, repeated."""

    def sized(samples: int) -> Inputs:
        return inputs.take(torch.arange(samples) % max(1, inputs.samples))

    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return Cost(
        parameters=parameter_count(model),
        macs=multiply_adds(model, inputs.head(2)),
        latency={size: latency(model, sized(size), seconds=SECONDS) for size in BATCH_SIZES},
        model_bytes=sum(tensor.nbytes for tensor in tensors),
        activation_bytes=activation_bytes(model, sized(1)),
    )


def activation_bytes(model: nn.Module, inputs: Inputs) -> int:
    """The most bytes that tensors take at once in a forward pass without gradients.

    Those of the input count, those of the model do not, nor what an operation uses inside itself.
    """
    own = [*model.parameters(), *model.buffers()]
    living = _Living(own)
    with evaluation(model), torch.no_grad(), living:
        # Copies, because what the caller holds does not die.
        inputs.to(device_of(model)).copy().run(model)
    return living.peak


class _Living(TorchDispatchMode):
    """Counts the bytes of storages from the operation that makes them to their end."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.storages:
            return
        self.storages.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, storage._cdata, storage.nbytes())

    def _leave(self, address: int, size: int) -> None:
        self.storages.discard(address)
        self.now -= size


def latency(model: nn.Module, inputs: Inputs, seconds: float = 0.3) -> float:
    """Median seconds of a forward pass in evaluation mode, over at least 10 after 3 of warm-up.

    Where one takes longer than ``seconds``, over 3 after 1.
    """
    device = device_of(model)
    inputs = inputs.to(device)

    def run() -> float:
        begin = time.perf_counter()
        inputs.run(model)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    with evaluation(model), torch.no_grad():
        long = run() > seconds
        for _ in range(0 if long else 2):
            run()
        times: list[float] = []
        while len(times) < (3 if long else 10) or sum(times) < seconds:
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
