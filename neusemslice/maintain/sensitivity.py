"""Sensitivity: how much a model's answers change if one group alone keeps fewer neurons.

Shares of the contribution are relative to their layer, so they tell which neurons of a group go
first but not which group should give up more. That is measured: for a few numbers of kept neurons
the model answers ``SAMPLES`` of the calibration samples with what compensation would put in place
of the others, their least-squares estimate from the kept ones where the group is read; where
nothing can be folded they are 0. The change is

    sum |answer - whole model's answer|² / sum |whole model's answer - its mean|²,

relative to how much answers vary. Between the measured numbers its logarithm is linear, below them
it goes on as it goes between the two lowest, and above the highest the change itself falls
linearly to 0.

Of groups that change the answers independently of each other the changes add up, and budgets
(``maintain/budgets.py``) make their sum small. Were all deviations alike, their roots would. That
was tried: ResNet-20 with half of the multiply-adds of its inner channels, compensated with 2,000
images, one shot on 4,000 other training images of CIFAR-10 and after an epoch of fine-tuning on the
2,500 images that learning rates are chosen on, one seed, accuracy in percent:

============================  ========  ================
budgets by                    one shot  after an epoch
============================  ========  ================
equal shares of contribution      82.9              84.0
the sum of changes                86.8              84.4
the sum of their roots            87.0              84.0
============================  ========  ================

Measuring each group once more with all others at the numbers so found, and then again, was tried as
well: 86.0 and 86.8 % on 8,000 training images, where the first budgets have 87.5.

Each group takes ``len(LEVELS) + 1`` passes over the samples; compensation later takes two passes
for each layer over all of the calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice._progress import track
from neusemslice.graph import Graph, Group, Inputs, device_of, evaluation, tensors_in
from neusemslice.maintain.capture import real_tokens
from neusemslice.maintain.compensate import RIDGE, check_repeatable
from neusemslice.maintain.folding import Place, foldable, grams_of, sweeps
from neusemslice.ops import Gram
from neusemslice.profiling import unlabelled
from neusemslice.slicing import Slice

SAMPLES = 512
"""Calibration samples that are answered; all if there are fewer."""

LEVELS = tuple(eighths / 8 for eighths in range(1, 8))
"""Shares of a group's neurons with which it is measured."""


@torch.no_grad()
def answer_changes(
    model: nn.Module, graph: Graph, orders: Sequence[Tensor], loader: Iterable[Any], caller: str
) -> list[Tensor]:
    """How much the answers change if a group alone keeps its first ``k`` neurons.

    Args:
        model: that the graph is of; it is left as it was.
        orders: of each group's neurons, those to keep first; int64 ``[C]``.
        loader: samples, with labels or without.
        caller: named in errors.

    Returns:
        Per group float64 ``[C + 1]``, not increasing and 0 at the end; all 0 of groups that are
        kept whole.

    Raises:
        ValueError: naming the layer, if it reads activations that are not finite; for a loader that
            can be gone through only once.
    """
    check_repeatable(loader, caller)
    changes = [torch.zeros(len(order) + 1, dtype=torch.float64) for order in orders]
    samples = list(_first(unlabelled(loader, caller)))
    with evaluation(model):
        read = {
            index: [place for places in sites for place in places]
            for index, sites in foldable(model, graph, loader, caller).items()
        }
        others: dict[int, list[Place]] = {
            index: []
            for index, group in enumerate(graph.groups)
            if index not in read and not group.kept_whole
        }
        for groups in (*sweeps(read), others):
            grams = grams_of(model, (p for found in groups.values() for p in found), loader, caller)
            for index in track(groups, f"{caller}: sensitivity"):
                group, order = graph.groups[index], orders[index]
                found = {place: grams[place] for place in groups[index]}
                if any(int(gram.count) <= place.features for place, gram in found.items()):
                    found = {}  # too few rows to tell anything from
                counts = _counts(group, len(order))
                without = [_without(model, graph, group, order, k, found) for k in counts]
                changes[index] = curve(len(order), counts, _changes(model, samples, without))
    return changes


def _first(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """The first ``SAMPLES`` samples."""
    left = SAMPLES
    for inputs in batches:
        yield inputs.head(left)
        left -= inputs.samples
        if left <= 0:
            return


def _counts(group: Group, neurons: int) -> list[int]:
    """Numbers of kept neurons to measure with, ascending."""
    counts = {max(group.least, 1, math.ceil(level * neurons)) for level in LEVELS}
    return sorted(count for count in counts if count < neurons)


def curve(neurons: int, counts: Sequence[int], changes: Sequence[float]) -> Tensor:
    """The changes with 0 to ``neurons`` kept neurons, float64, from those that were measured.

    Args:
        counts: ascending, less than ``neurons``.
        changes: with so many kept neurons.
    """
    found = torch.zeros(neurons + 1, dtype=torch.float64)
    if not counts:
        return found
    tiny = torch.finfo(torch.float64).tiny
    # More neurons change less; what says otherwise is chance.
    logs = torch.tensor(changes, dtype=torch.float64).flip(0).cummax(0).values.flip(0)
    logs = logs.clamp_min(tiny).log()
    first, second = counts[0], counts[1] if len(counts) > 1 else neurons
    slope = float(logs[0] - logs[1]) / (second - first) if len(counts) > 1 else 0.0
    for k in range(first):
        found[k] = math.exp(min(700.0, float(logs[0]) + slope * (first - k)))
    for i, low in enumerate(counts[:-1]):
        high = counts[i + 1]
        for k in range(low, high):
            found[k] = torch.lerp(logs[i], logs[i + 1], (k - low) / (high - low)).exp()
    last = counts[-1]
    for k in range(last, neurons):
        found[k] = logs[-1].exp() * ((neurons - k) / (neurons - last))
    return found


@dataclass(frozen=True)
class _Estimate:
    """What compensation puts in place of the neurons at a place that are gone."""

    place: Place
    kept: Tensor
    gone: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, model: nn.Module, place: Place, gram: Gram, order: Tensor, count: int) -> _Estimate:
        within = torch.arange(place.each)
        features = (order.unsqueeze(1) * place.each + within).to(gram.products.device)
        kept, gone = features[:count].flatten(), features[count:].flatten()
        rows = gram.products.index_select(0, kept)
        own, cross = rows.index_select(1, kept), rows.index_select(1, gone)
        own.diagonal().add_(RIDGE * own.diagonal().mean().clamp_min(torch.finfo(own.dtype).tiny))
        weight = torch.cholesky_solve(cross, torch.linalg.cholesky(own)).mT
        bias = gram.mean[gone] - weight @ gram.mean[kept]
        dtype = model.get_parameter(f"{place.reader.module}.weight").dtype
        return cls(place, kept, gone, weight.to(dtype), bias.to(dtype))

    def hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs["input"]
        rows = self.place.rows(x, None)
        known = rows.index_select(1, self.kept)
        estimate = torch.addmm(self.bias.to(x.dtype), known, self.weight.mT.to(x.dtype))
        x = self.place.written(x, rows.index_copy(1, self.gone, estimate))
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})


@contextmanager
def _estimated(model: nn.Module, estimates: Sequence[_Estimate]) -> Iterator[None]:
    with ExitStack() as stack:
        for estimate in estimates:
            module = model.get_submodule(estimate.place.reader.module)
            handle = module.register_forward_pre_hook(estimate.hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _without(
    model: nn.Module,
    graph: Graph,
    group: Group,
    order: Tensor,
    count: int,
    grams: Mapping[Place, Gram],
) -> Callable[[], AbstractContextManager[None]]:
    """Inside the block the model answers as if the group had kept its first ``count`` neurons."""
    if grams:
        estimates = [
            _Estimate.of(model, place, gram, order, count) for place, gram in grams.items()
        ]
        return lambda: _estimated(model, estimates)
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:count]] = True
    kept = Slice(graph, Slice.whole(graph).masks() | dict.fromkeys(group.sites, mask))
    return lambda: kept.masking(model)


def _changes(
    model: nn.Module,
    samples: Sequence[Inputs],
    without: Sequence[Callable[[], AbstractContextManager[None]]],
) -> list[float]:
    """The change of the answers in each of the blocks."""
    count = 0
    total, squares = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    missed = torch.zeros(len(without), dtype=torch.float64)
    for inputs in samples:
        inputs = inputs.to(device_of(model))
        whole = _answers(model, inputs)
        if count == 0:
            total = torch.zeros_like(whole[0], dtype=torch.float64)
        count += len(whole)
        total += whole.sum(0, dtype=torch.float64)
        squares += whole.square().sum(dtype=torch.float64).cpu()
        for i, inside in enumerate(without):
            with inside():
                change = _answers(model, inputs).sub_(whole)
                missed[i] += change.square_().sum(dtype=torch.float64).cpu()
    varied = squares - (total.square().sum() / max(1, count)).cpu()
    found: list[float] = missed.div(varied.clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    return found


def _answers(model: nn.Module, inputs: Inputs) -> Tensor:
    """The first tensor that the model answers, ``[R, K]`` in float32 or wider, of real tokens."""
    answer = next(t for t in tensors_in(inputs.run(model)) if t.is_floating_point())
    keep = real_tokens(inputs, answer)
    rows = answer.flatten(0, -2) if answer.ndim > 1 else answer.unsqueeze(1)
    rows = rows if keep is None else rows[keep]
    return rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
