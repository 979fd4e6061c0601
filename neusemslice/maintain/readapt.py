"""Re-adaptation: fit new samples by tuning critical neurons only.

The new samples are profiled, semantic components are ranked by how far their class means moved,
and the critical neurons of the first components, up to the budget, are tuned. Nothing else changes
by a bit: not a weight outside their rows, not a running statistic, whatever weight decay does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.maintain.training import Training, fit
from neusemslice.optim import MaskedAdamW
from neusemslice.profiling import Profile, profile
from neusemslice.slicing import SemanticSlicing, Slice


@dataclass(frozen=True)
class ReadaptReport:
    """What re-adaptation did.

    Attributes:
        tuned_neurons: share of the model's neurons that were tuned.
        tuned_parameters: number of parameters that were tuned.
        components: the tuned semantic components, the one that moved farthest first.
        drift: per component, the mean shift of its neurons' class means in standard deviations.
        training: steps, seconds, losses and bytes of optimizer state.
    """

    tuned_neurons: float
    tuned_parameters: int
    components: tuple[int, ...]
    drift: tuple[float, ...]
    training: Training


@dataclass(frozen=True)
class Readapted:
    """The model that fits the new samples, the slice that was tuned, and the report."""

    model: nn.Module
    tuned: Slice
    report: ReadaptReport


def readapt(
    model: nn.Module,
    slicing: SemanticSlicing,
    loader: Iterable[Any],
    budget: float = 0.2,
    *,
    epochs: int = 5,
    lr: float = 3e-3,
    weight_decay: float = 1e-2,
) -> Readapted:
    """Tunes the critical neurons that the new samples moved most, on a copy of the model.

    Args:
        model: the one that the slicing was made from; it is left as it was.
        slicing: from ``neusemslice.slice``.
        loader: new samples, passed over once to profile them and once per epoch.
        budget: share of the model's neurons that may be tuned.
        epochs, lr, weight_decay: of the training with ``MaskedAdamW``; ``lr`` falls to 0.

    Raises:
        ValueError: for a slicing of another model, a budget outside (0, 1] or below one neuron,
            or new samples with NaN or infinite activations.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"readapt: budget must lie in (0, 1], got {budget}")
    critical = slicing.critical_slice()
    critical.check_model(model)
    allowed = int(budget * critical.graph.neurons)
    if allowed < 1:
        raise ValueError(
            f"readapt: budget {budget} of {critical.graph.neurons} neurons is less than one"
        )
    adapted = copy.deepcopy(model)
    new = profile(
        adapted,
        loader,
        ("avg",),
        num_classes=slicing.profile.num_classes,
        class_names=slicing.profile.class_names,
    )
    if bad := new.nonfinite():
        listed = ", ".join(f"{name} ({count})" for name, count in bad.items())
        raise ValueError(f"readapt: the new samples have NaN or infinite activations at {listed}")
    drift = _drift(slicing, new)
    tuned, components = _choose(slicing, drift, allowed)
    groups = tuned.parameters(adapted)
    optimizer = MaskedAdamW(groups, lr=lr, weight_decay=weight_decay)
    training = fit(adapted, loader, optimizer, epochs, what="readapt")
    tuned_parameters = sum(
        parameter.numel() // parameter.shape[dim] * len(rows)
        for group in groups
        for parameter, dim, rows in zip(
            group["params"], group["neuron_dims"], group["rows"], strict=True
        )
    )
    report = ReadaptReport(
        tuned.density, tuned_parameters, tuple(components), tuple(drift.tolist()), training
    )
    return Readapted(adapted, tuned, report)


def _drift(slicing: SemanticSlicing, new: Profile) -> Tensor:
    """How far each component's class means moved, float64 ``[components]``.

    The shift of a neuron in a class is in units of its spread over the old samples of all classes,
    weighted by its share in the class, and averaged over the classes that both profiles have seen.
    """
    old = slicing.profile
    seen = (old.samples > 0) & (new.samples > 0)
    total = torch.zeros(slicing.num_components, dtype=torch.float64)
    count = torch.zeros(slicing.num_components, dtype=torch.float64)
    for site in old.graph.sites:
        before, after = old.activations[site.name], new.activations[site.name]
        assert before.mean is not None
        assert after.mean is not None
        weight = (before.count / before.count.sum()).unsqueeze(1)
        centre = (weight * before.mean).sum(0)
        spread = (weight * (before.variance() + (before.mean - centre) ** 2)).sum(0).sqrt()
        moved = (after.mean - before.mean).abs() / spread.clamp_min(1e-12)
        p = slicing.shares[site.name]
        shift = (p[seen] * moved.cpu()[seen]).sum(0) / p[seen].sum(0).clamp_min(1e-300)
        shift = torch.where(spread.cpu() > 0, shift, 0.0)
        component = slicing.components[site.name]
        critical = component >= 0
        total.index_add_(0, component[critical], shift[critical])
        count.index_add_(0, component[critical], torch.ones_like(shift[critical]))
    return total / count.clamp_min(1)


def _choose(slicing: SemanticSlicing, drift: Tensor, allowed: int) -> tuple[Slice, list[int]]:
    """Whole components in the order of their drift; the last one by the shares of its neurons."""
    graph = slicing.profile.graph
    chosen = Slice(graph, {})
    used: list[int] = []
    for component in drift.sort(descending=True, stable=True).indices.tolist():
        room = allowed - len(chosen)
        if room <= 0:
            break
        members = slicing.component_slice(component)
        if len(members) > room:
            members = _heaviest(slicing, members, room)
        chosen = chosen | members
        used.append(component)
    return chosen, used


def _heaviest(slicing: SemanticSlicing, members: Slice, count: int) -> Slice:
    masks = members.masks()
    weight = torch.cat(
        [torch.where(mask, slicing.importance(name), -1.0) for name, mask in masks.items()]
    )
    best = torch.zeros_like(weight, dtype=torch.bool)
    best[weight.sort(descending=True, stable=True).indices[:count]] = True
    parts = best.split([len(mask) for mask in masks.values()])
    return Slice(members.graph, dict(zip(masks, parts, strict=True)))
