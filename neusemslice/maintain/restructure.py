"""Restructuring: a physically smaller model that holds a slice and nothing else.

Critical neurons stay, the rest is removed. The slice is closed under coupling first (a coupled
neuron stays if any site of its group keeps it; a group that cannot lose neurons stays whole).
A copy is cut (``maintain/cutting.py``); then it must answer as the original does with the removed
neurons masked, or nothing is returned. What the removed neurons did is then made up for by those
that are left (``maintain/compensate.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from neusemslice import _files
from neusemslice.graph import Inputs, device_of
from neusemslice.maintain.compensate import Refit
from neusemslice.maintain.compensate import compensate as fit_layers
from neusemslice.maintain.cost import Cost, measure
from neusemslice.maintain.cost import latency as measure_latency
from neusemslice.maintain.cutting import check_pruned, prune
from neusemslice.maintain.pretrained import save_pretrained
from neusemslice.maintain.saving import read_model, write_model
from neusemslice.maintain.search import removable
from neusemslice.maintain.targets import checked_target, meet, sensitivity_of
from neusemslice.profiling import first_inputs
from neusemslice.slicing import SemanticSlicing, Slice


@dataclass(frozen=True)
class RestructureReport:
    """What restructuring did.

    Attributes:
        before, after: cost of the model, on samples of the first calibration batch.
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

    @classmethod
    def of(
        cls,
        model: nn.Module,
        small: nn.Module,
        kept: Slice,
        inputs: Inputs,
        difference: float,
        refits: dict[str, Refit],
    ) -> RestructureReport:
        """Measures a model and what was left of it on a batch."""
        groups = [group for group in kept.graph.groups if group.kept_whole]
        return cls(
            before=measure(model, inputs),
            after=measure(small, inputs),
            widths={row.site: (row.neurons, row.kept) for row in kept.table()},
            kept_whole={name: group.kept_whole for group in groups for name in group.sites},
            difference=difference,
            refits=refits,
        )

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> RestructureReport:
        """The inverse of ``dataclasses.asdict`` and JSON."""
        return cls(
            before=Cost.from_json(raw["before"]),
            after=Cost.from_json(raw["after"]),
            widths={name: (int(old), int(new)) for name, (old, new) in raw["widths"].items()},
            kept_whole=dict(raw["kept_whole"]),
            difference=float(raw["difference"]),
            refits={name: Refit(**refit) for name, refit in raw["refits"].items()},
        )


@dataclass(frozen=True)
class Restructured:
    """The smaller model, the slice of the original that it holds, and the report.

    The model is one of plain modules: it may be trained, compiled and exported like any other.
    """

    model: nn.Module
    kept: Slice
    report: RestructureReport

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the model as it is now, its slice and the report to one file, atomically."""
        return write_model(path, self.model, self.kept, asdict(self.report))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Saves a model of transformers as it is now, for the library's own ``from_pretrained``.

        Raises:
            TypeError: for any other model.
            ValueError: if no configuration describes it, because its layers were cut unequally or
                the library has no number for what was cut; names the layers.
        """
        return save_pretrained(self.model, self.kept, folder)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> Restructured:
        """Reads what ``save`` wrote, in any process, bit for bit.

        Args:
            path: the file.
            model: freshly built as the original was; a copy of it is cut to the sizes in the file
                and takes the tensors. Its own values do not matter.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it; also for a
                model of another structure than the original's.
        """
        small, kept, raw = read_model(path, model)
        report = _files.built(path, lambda: RestructureReport.from_json(raw))
        return cls(small, kept, report)


def restructure(
    model: nn.Module,
    slicing: SemanticSlicing | Slice,
    *,
    calibration: Iterable[Any],
    macs: float | None = None,
    params: float | None = None,
    keep: float | None = None,
    latency: float | None = None,
    round_to: int | None = None,
    compensate: bool = True,
) -> Restructured:
    """Removes the neurons outside a slice from a copy of the model.

    Without a target the critical slice (or the given ``Slice``) stays. With a target, coupled
    groups keep as many neurons as the model's answers need them, measured on calibration samples
    (``maintain/sensitivity.py``); without compensation, the same share of their contribution to the
    classes, the largest that meets the target, by the fewest neurons; with ``keep``, the same share
    of their neurons. Those of greatest share in the contribution to any one class stay; with
    compensation, those of greatest share that the others cannot make up for
    (``maintain/redundancy.py``). ``nss.maintain.plan`` shows all that before anything is cut.

    Args:
        model: the one that the slicing was made from; it is left as it was.
        slicing: from ``neusemslice.slice``, or the slice to keep.
        calibration: a loader whose first batch the result is checked with, and whose samples
            compensation goes through once for each layer, and before, with a target, to see which
            neurons the others make up for and what each group's neurons are worth to the answers;
            labels are not used.
        macs, params: share of the multiply-adds or of the parameters to keep at most.
        keep: share of each group's neurons to keep.
        latency: share of the time of a forward pass over the first calibration batch to keep at
            most, as measured on this machine while searching.
        round_to: with a target, the number of neurons that each group keeps is a multiple of this,
            or all of them. By default that is 8 in layers of at least 16 neurons if the target is
            ``macs`` or ``latency`` and can be met so: such layers fill the processor's registers.
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
    inputs = first_inputs(calibration, "restructure", device_of(model))
    targets = {"macs": macs, "params": params, "keep": keep, "latency": latency}
    target = checked_target("restructure", targets, round_to)
    if isinstance(slicing, Slice):
        if target is not None:
            raise ValueError(
                "restructure: a target needs a slicing to rank neurons by, got a Slice"
            )
        wanted = slicing
    else:
        wanted = slicing.critical_slice()
    wanted.check_model(model)
    if isinstance(slicing, SemanticSlicing) and target is not None:

        def latency_left(kept: Slice) -> float:
            # The whole model right before, because a machine's speed changes with time.
            whole = measure_latency(model, inputs)
            return measure_latency(prune(model, kept), inputs) / whole

        folded = calibration if compensate else None
        found = sensitivity_of(model, slicing, folded, target[0], "restructure")
        wanted = meet(model, slicing, found, *target, round_to, "restructure", latency_left)
    kept = removable(wanted, "restructure")
    pruned = prune(model, kept)
    difference = check_pruned(model, pruned, kept, inputs)
    refits = {}
    if compensate:
        refits = fit_layers(model, pruned, kept, calibration, "restructure")
    report = RestructureReport.of(model, pruned, kept, inputs, difference, refits)
    return Restructured(pruned, kept, report)
