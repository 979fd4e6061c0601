"""What neurons contribute to each class's loss (contract: ``csrc/ops/contribution.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from neusemslice.ops._fake import check_one_device, register_fake
from neusemslice.ops.class_stats import ClassOrder, ClassStats

CONTRIBUTION_STATISTICS = ("mean", "mean_abs")
"""The statistics that a state of contributions can hold."""


def contribution_(
    state: ClassStats,
    x: Tensor,
    g: Tensor,
    order: ClassOrder,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    neuron_dim: int = 1,
) -> None:
    """Adds the contributions of a batch to ``state``, in place, in one pass over ``x`` and ``g``.

    The contribution of neuron ``c`` in sample ``n`` is the mean of ``x * g`` over the positions
    that the mask keeps. It enters ``mean``, and its absolute value ``mean_abs``; each sample counts
    as one position.

    Products and sums are taken in float64, in a fixed order: the result has the same bits each
    time, at any number of threads and on any CPU.

    Args:
        state: of ``K`` classes and ``C`` neurons, with no statistic but
            ``CONTRIBUTION_STATISTICS``.
        x: activations: float64, float32, float16 or bfloat16 with ``C`` neurons; any strides.
        g: their gradients: the shape of ``x``; strides and dtype may differ from those of ``x``.
        order: what ``class_order`` gave for the batch's labels.
        weight: as for ``class_stats_``.
        mask: as for ``class_stats_``.
        neuron_dim: where the neurons are.

    A product that is NaN or infinite is counted in ``state.nonfinite`` (once for each class of its
    sample) and enters the sums as 0.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device, a state with other statistics, or (on the CPU) a
            wrong weight, share or order. Nothing has changed then.
    """
    if other := [name for name in ("m2", "max", "active") if getattr(state, name) is not None]:
        raise ValueError(
            f"contribution_: the state must hold no statistic but {CONTRIBUTION_STATISTICS}, "
            f"got {other}"
        )
    torch.ops.neusemslice.contribution_(
        state.count,
        state.positions,
        state.nonfinite,
        state.mean,
        state.mean_abs,
        x,
        g,
        order.order,
        order.offsets,
        order.share,
        weight,
        mask,
        neuron_dim,
    )


@register_fake("contribution_")
def _contribution_fake(*arguments: object) -> None:
    check_one_device("contribution_", *arguments)
    for changed in arguments[:5]:
        if isinstance(changed, Tensor):
            torch.autograd.graph.increment_version(changed)
