"""Regrowing: a restructured model gets some of its removed neurons back.

They return with the parent's weights, bit for bit; all else stays as it is in the restructured
model now, trained or not. But what was left had learned to do without them: compensation folded
into other weights what they did. So the layers are fitted once more to what the parent answers,
from the weights as they are now; or the model is trained instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from neusemslice.graph import device_of
from neusemslice.maintain.compensate import compensate as fit_layers
from neusemslice.maintain.cutting import check_pruned, prune
from neusemslice.maintain.restructure import Restructured, RestructureReport
from neusemslice.maintain.search import removable
from neusemslice.maintain.undo import Undo
from neusemslice.profiling import first_inputs
from neusemslice.slicing import Slice


def regrow(
    small: Restructured,
    undo: Undo,
    neurons: Slice,
    *,
    calibration: Iterable[Any],
    compensate: bool = True,
) -> Restructured:
    """Gives a copy of a restructured model some of its removed neurons back.

    Args:
        small: left as it was.
        undo: of the model, or of what it was before it was trained.
        neurons: of the parent, those to have as well; with them come those coupled to them.
        calibration: as for ``restructure``.
        compensate: whether the layers are fitted to what the parent answers. With False the
            weights that were left stay as they are.

    Raises:
        ValueError: for an undo or a slice of another model; with ``compensate``, for an undo that
            does not give the parent because the model was trained since, and as ``restructure``.
        RuntimeError: as ``restructure``.
    """
    if small.kept != undo.kept:
        raise ValueError(
            f"regrow: the undo must be of what the model holds, {small.kept!r}, got that of "
            f"{undo.kept!r}"
        )
    whole = undo.whole(small.model)
    parent = undo.parent(small.model) if compensate else whole
    inputs = first_inputs(calibration, "regrow", device_of(whole))
    kept = removable(small.kept | neurons, "regrow")
    grown = prune(whole, kept)
    difference = check_pruned(whole, grown, kept, inputs)
    refits = fit_layers(parent, grown, kept, calibration, "regrow") if compensate else {}
    report = RestructureReport.of(whole, grown, kept, inputs, difference, refits)
    return Restructured(grown, kept, report)
