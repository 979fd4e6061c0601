"""Restructuring: a physically smaller model that holds a slice and nothing else.

Critical neurons stay, the rest is removed. The slice is closed under coupling first (a coupled
neuron stays if any site of its group keeps it; a group that cannot lose neurons stays whole).
A copy is cut (``maintain/cutting.py``); then it must answer as the original does with the removed
neurons masked, or nothing is returned. What the removed neurons did is then made up for by those
that are left (``maintain/compensate.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neusemslice.graph import device_of
from neusemslice.maintain.compensate import Refit
from neusemslice.maintain.compensate import compensate as fit_layers
from neusemslice.maintain.cost import Cost, measure
from neusemslice.maintain.cost import latency as measure_latency
from neusemslice.maintain.cutting import check_pruned, prune
from neusemslice.maintain.targets import meet
from neusemslice.profiling import first_inputs
from neusemslice.slicing import SemanticSlicing, Slice


@dataclass(frozen=True)
class RestructureReport:
    """What restructuring did.

    Attributes:
        before, after: cost of the model; latency is on the first calibration batch.
        widths: per site, neurons before and after.
        kept_whole: per site that could not lose neurons, why.
        difference: largest difference between pruned and masked, before compensation, relative to
            the output's scale.
        refits: per layer that compensation fitted, the share of its answer's variance that it
            missed before and after.
    """

    before: Cost
    after: Cost
    widths: dict[str, tuple[int, int]]
    kept_whole: dict[str, str]
    difference: float
    refits: dict[str, Refit]


@dataclass(frozen=True)
class Restructured:
    """The smaller model, the slice of the original that it holds, and the report."""

    model: nn.Module
    kept: Slice
    report: RestructureReport


def restructure(
    model: nn.Module,
    slicing: SemanticSlicing | Slice,
    *,
    calibration: Iterable[Any],
    macs: float | None = None,
    params: float | None = None,
    keep: float | None = None,
    latency: float | None = None,
    round_to: int = 1,
    compensate: bool = True,
) -> Restructured:
    """Removes the neurons outside a slice from a copy of the model.

    Without a target the critical slice (or the given ``Slice``) stays. With a target, every coupled
    group keeps the same share of its neurons, the largest that meets the target, and within the
    group those with the greatest share in the contribution to any one class.

    Args:
        model: the one that the slicing was made from; it is left as it was.
        slicing: from ``neusemslice.slice``, or the slice to keep.
        calibration: a loader whose first batch the result is checked with, and whose samples
            compensation goes through once for each layer; labels are not used.
        macs, params: share of the multiply-adds or of the parameters to keep at most.
        keep: share of each group's neurons to keep.
        latency: share of the time of a forward pass over the first calibration batch to keep at
            most, as measured on this machine while searching.
        round_to: with a target, the number of neurons that each group keeps is a multiple of this,
            or all of them; sizes that fit the processor's registers are faster.
        compensate: whether the layers that are left are fitted, one after the other, to what the
            whole model answers on the calibration samples, so that they make up for the neurons
            that are gone. It needs neither labels nor training, and more rows (samples times
            positions) than any layer has features.

    Raises:
        ValueError: for a slicing of another model, several targets, a target outside (0, 1], one
            that cannot be met, or a target together with a ``Slice``; for too few calibration
            samples to compensate with, naming the layer.
        RuntimeError: if the pruned model does not answer as the masked one; the message names the
            first site that differs.
    """
    graph = slicing.profile.graph if isinstance(slicing, SemanticSlicing) else slicing.graph
    inputs = first_inputs(calibration, "restructure", device_of(model))
    targets = {"macs": macs, "params": params, "keep": keep, "latency": latency}
    chosen = {name: value for name, value in targets.items() if value is not None}
    if len(chosen) > 1:
        raise ValueError(f"restructure: give one target, got {sorted(chosen)}")
    for name, value in chosen.items():
        if not 0 < value <= 1:
            raise ValueError(f"restructure: {name} must lie in (0, 1], got {value}")
    if round_to < 1:
        raise ValueError(f"restructure: round_to must be at least 1, got {round_to}")
    if isinstance(slicing, Slice):
        if chosen:
            raise ValueError(
                "restructure: a target needs a slicing to rank neurons by, got a Slice"
            )
        wanted = slicing
    else:
        wanted = slicing.critical_slice()
    wanted.check_model(model)
    if isinstance(slicing, SemanticSlicing) and chosen:

        def latency_left(kept: Slice) -> float:
            # The whole model right before, because a machine's speed changes with time.
            whole = measure_latency(model, inputs)
            return measure_latency(prune(model, _removable(kept)), inputs) / whole

        wanted = meet(model, slicing, *chosen.popitem(), round_to, latency_left)
    kept = _removable(wanted)
    pruned = prune(model, kept)
    difference = check_pruned(model, pruned, kept, inputs)
    refits = fit_layers(model, pruned, kept, calibration) if compensate else {}
    return Restructured(
        pruned,
        kept,
        RestructureReport(
            before=measure(model, inputs),
            after=measure(pruned, inputs),
            widths={s.name: (s.neurons, int(kept.mask(s.name).sum())) for s in graph.sites},
            kept_whole={n: g.kept_whole for g in graph.groups if g.kept_whole for n in g.sites},
            difference=difference,
            refits=refits,
        ),
    )


def _removable(wanted: Slice) -> Slice:
    """The closed slice, with whole groups where nothing may be removed, and no site left empty."""
    masks = wanted.closed().masks()
    for group in wanted.graph.groups:
        for name in group.sites:
            if group.kept_whole:
                masks[name] = torch.ones_like(masks[name])
            elif not masks[name].any():
                raise ValueError(f"restructure: no neuron of site {name} would be left")
            elif int(masks[name].sum()) < group.least:
                raise ValueError(
                    f"restructure: site {name} must keep at least {group.least} neurons, as many "
                    f"experts as each token has; {int(masks[name].sum())} would be left"
                )
    return Slice(wanted.graph, masks)
