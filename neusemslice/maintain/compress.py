"""Compression: parts of a model removed step by step, with fine-tuning in between.

Each iteration removes the same share of what is left, of whole neurons or of single weights; which
ones, a layer-wise choice says (``maintain/sparsity.py``). Then the model is fine-tuned and scored.
It goes on until the accuracy that may be lost is spent, and the last model that has kept it is
returned. Removed neurons are gone; removed weights are held at exactly 0 through fine-tuning.

A model that a slicing has restructured is compressed further by the same call; the accuracy of the
whole model is then what the loss counts from.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neusemslice.graph import Graph, Group, Inputs, device_of, trace
from neusemslice.maintain.cost import parameter_count, sliced_cost
from neusemslice.maintain.cutting import check_pruned, prune
from neusemslice.maintain.finetune import finetune
from neusemslice.maintain.search import removable
from neusemslice.maintain.sparsity import METHODS, Method, Units, counts, fewest, strongest
from neusemslice.maintain.training import score
from neusemslice.profiling import first_inputs
from neusemslice.slicing import Slice

Granularity = Literal["neuron", "weight"]


@dataclass(frozen=True)
class CompressReport:
    """What compression did.

    Attributes:
        parameters: of the model given, then after each iteration, those that are not removed; of
            the last iteration, which was too much, as well.
        accuracies: likewise, on the validation samples.
        iterations: how many the model has gone through.
        least: the accuracy that had to be kept.
        stopped: why there was no further iteration.
    """

    parameters: tuple[int, ...]
    accuracies: tuple[float, ...]
    iterations: int
    least: float
    stopped: str

    @property
    def rate(self) -> float:
        """How many times fewer parameters than the model given."""
        return self.parameters[0] / self.parameters[self.iterations]


@dataclass(frozen=True)
class Compressed:
    """The smaller model, per parameter which weights stay (of single weights only), the report."""

    model: nn.Module
    masks: dict[str, Tensor]
    report: CompressReport


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    validation: Iterable[Any],
    *,
    method: Method = "lamp",
    granularity: Granularity = "neuron",
    step: float = 0.2,
    budget: float = 0.01,
    accuracy: float | None = None,
    epochs: int = 1,
    lr: float = 1e-3,
    teacher: nn.Module | None = None,
) -> Compressed:
    """Removes neurons or weights from a copy of the model until the accuracy budget is spent.

    Args:
        model: left as it was.
        loader: labelled batches to fine-tune with.
        validation: labelled batches to score with, of samples that the loader does not have.
        method: how many each layer loses: "lamp", "global", "uniform+" or "erk".
        granularity: whether whole neurons go, or single weights of convolutions and linear layers
            that share theirs with no other module.
        step: share of the parameters that are left to remove in each iteration; of single weights,
            of those that may go.
        budget: by how much the accuracy may fall, in [0, 1].
        accuracy: from where it falls; by default the model's own on ``validation``. Of a
            restructured model give that of the whole one.
        epochs, lr, teacher: of fine-tuning in each iteration, see ``finetune``.

    Raises:
        ValueError: for an unknown method or granularity, ``step`` outside (0, 1), ``budget`` or
            ``accuracy`` outside [0, 1], or a model that is below the accuracy to keep from the
            start; as ``finetune``.
        RuntimeError: as ``restructure``, if removing neurons went wrong.
    """
    for name, value, known in (
        ("method", method, METHODS),
        ("granularity", granularity, get_args(Granularity)),
    ):
        if value not in known:
            raise ValueError(f"compress: {name} must be one of {list(known)}, got {value!r}")
    if not 0 < step < 1:
        raise ValueError(f"compress: step must lie in (0, 1), got {step}")
    for name, share in (("budget", budget), ("accuracy", accuracy)):
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"compress: {name} must lie in [0, 1], got {share}")
    of_weights = granularity == "weight"
    inputs = first_inputs(loader, "compress", device_of(model))
    found = score(model, validation, "compress").accuracy
    least = (found if accuracy is None else accuracy) - budget
    if found < least:
        raise ValueError(
            f"compress: the model's accuracy is {found:.4f} from the start, below the "
            f"{least:.4f} to keep"
        )
    best, masks = copy.deepcopy(model), _weights(model, inputs) if of_weights else {}
    parameters, accuracies = [parameter_count(model)], [found]
    while True:
        left = (1 - step) ** len(parameters)
        try:
            if of_weights:
                fewer = _fewer_weights(best, masks, method, left)
                candidate = copy.deepcopy(best)
            else:
                fewer = {}
                candidate = _without_neurons(best, method, int(left * parameters[0]), inputs)
        except _ExhaustedError as end:
            stopped = str(end)
            break
        with _held(candidate, fewer):
            finetune(candidate, loader, epochs=epochs, lr=lr, teacher=teacher)
        gone = sum(int((~mask).sum()) for mask in fewer.values())
        parameters.append(parameter_count(candidate) - gone)
        accuracies.append(score(candidate, validation, "compress").accuracy)
        if accuracies[-1] < least:
            stopped = f"the accuracy fell to {accuracies[-1]:.4f}, below the {least:.4f} to keep"
            break
        best, masks = candidate, fewer
    iterations = len(parameters) - 1 - (accuracies[-1] < least)
    report = CompressReport(tuple(parameters), tuple(accuracies), iterations, least, stopped)
    return Compressed(best, masks, report)


class _ExhaustedError(Exception):
    """There is nothing more to remove."""


@contextmanager
def _held(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the model trains with its masked weights at 0; they stay so afterwards."""
    for name, mask in masks.items():
        module, _, own = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(module), own, _Masked(mask))
    try:
        yield
    finally:
        for name in masks:
            module, _, own = name.rpartition(".")
            parametrize.remove_parametrizations(model.get_submodule(module), own)


class _Masked(nn.Module):
    """Weights where the mask is, 0 elsewhere."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)


# Single weights.


def _weights(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Masks of all weights of convolutions and linear layers, in the order of their calls."""
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    weights = {
        name: model.get_parameter(name)
        for layer in trace(model, inputs.head(2)).layers
        for name in [f"{layer.name}.weight"]
    }
    return {
        name: torch.ones_like(weight, dtype=torch.bool)
        for name, weight in weights.items()
        if owners[id(weight)] == 1
    }


def _fewer_weights(
    model: nn.Module, masks: Mapping[str, Tensor], method: Method, left: float
) -> dict[str, Tensor]:
    """Masks that leave a share of all weights, and none that was masked before."""
    squares = [
        torch.where(mask, model.get_parameter(name).detach().double().square(), -1.0)
        for name, mask in masks.items()
    ]
    last = len(squares) - 1
    layers = [
        Units(own.flatten().clamp_min(0), tuple(own.shape), first=i == 0, last=i == last)
        for i, own in enumerate(squares)
    ]
    now = sum(int(mask.sum()) for mask in masks.values())
    keep = round(left * sum(map(len, layers)))
    if not sum(fewest(method, layers)) <= keep < now:
        raise _ExhaustedError(f"{method} cannot leave {keep} of {now} weights")
    numbers = counts(method, layers, keep)
    return {
        name: strongest(own.flatten(), number).view_as(own) & mask
        for (name, mask), own, number in zip(masks.items(), squares, numbers, strict=True)
    }


# Neurons.


def _without_neurons(model: nn.Module, method: Method, target: int, inputs: Inputs) -> nn.Module:
    """A copy with as many neurons as ``target`` parameters allow, checked."""
    graph = trace(model, inputs.head(2))
    groups = [group for group in graph.groups if not group.kept_whole]
    layers = [_neurons(model, graph, group) for group in groups]

    def keeping(neurons: int) -> Slice:
        masks = Slice.whole(graph).masks()
        numbers = counts(method, layers, neurons)
        for group, units, number in zip(groups, layers, numbers, strict=True):
            masks.update(dict.fromkeys(group.sites, strongest(units.squares, number).cpu()))
        return removable(Slice(graph, masks), "compress")

    def fits(neurons: int) -> bool:
        return sliced_cost(model, graph, keeping(neurons))[0] <= target

    low, high = sum(fewest(method, layers)), sum(map(len, layers))
    if not groups or low == high or not fits(low):
        raise _ExhaustedError(f"{method} cannot leave {target} parameters or fewer")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    kept = keeping(low)
    pruned = prune(model, kept)
    check_pruned(model, pruned, kept, inputs)
    return pruned


def _neurons(model: nn.Module, graph: Graph, group: Group) -> Units:
    """A group's neurons, each with the weights that make it."""
    sites = [graph.site(name) for name in group.sites]
    squares = torch.zeros(sites[0].neurons, dtype=torch.float64, device=device_of(model))
    every = torch.arange(len(squares), device=squares.device)
    weights = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1}
    # Coupled sites may have a span in common.
    spans = dict.fromkeys(s for site in sites for s in site.rows if s.tensor in weights)
    for span in spans:
        rows = weights[span.tensor].detach().double().square()
        rows = rows.movedim(span.dim, 0).index_select(0, span.indices(every))
        squares += rows.reshape(len(squares), -1).sum(1)
    readers = {reader.module for site in sites for reader in site.readers}
    return Units(
        squares,
        tuple(weights[next(iter(spans)).tensor].shape),
        first=any(graph.layers[0].name in site.producers for site in sites),
        last=not readers.isdisjoint(graph.outputs),
        least=group.least,
    )
