"""Streaming statistics of neurons, per class (contract: ``csrc/ops/class_stats.h``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from neusemslice.ops._fake import check_one_device, register_fake

STATISTICS = ("mean", "m2", "mean_abs", "max", "active")
"""The statistics that a state can hold; ``m2`` needs ``mean``."""


class ClassOrder(NamedTuple):
    """Samples grouped by class: class ``k`` is ``order[offsets[k]:offsets[k + 1]]``.

    With soft labels a sample is there once for each class, and ``share`` (float64, as long as
    ``order``) is the part of it that belongs to the class.
    """

    order: Tensor
    offsets: Tensor
    share: Tensor | None = None

    def to(self, device: torch.device | str) -> ClassOrder:
        """The same on ``device``, without a wait for it."""
        return ClassOrder(
            self.order.to(device, non_blocking=True),
            self.offsets.to(device, non_blocking=True),
            None if self.share is None else self.share.to(device, non_blocking=True),
        )


@dataclass
class ClassStats:
    """State of one site of ``K`` classes and ``C`` neurons; all tensors are contiguous.

    Attributes:
        count: float64 ``[K]``, sum of the samples' weights.
        positions: float64 ``[K]``, sum of the weights of their positions (pixels, tokens).
        nonfinite: int64 ``[C]``, values that were NaN or infinite.
        mean: float64 ``[K, C]``, mean of the pooled activation ``a[n, c]``.
        m2: float64 ``[K, C]``, its sum of squared deviations; the variance is ``m2 / count``.
        mean_abs: float32 ``[K, C]``, mean of ``|x|`` over positions.
        max: float32 ``[K, C]``, maximum over positions, ``-inf`` where the class is empty.
        active: float32 ``[K, C]``, share of the positions where ``x > 0``.

    A statistic that is ``None`` is neither computed nor stored.
    """

    count: Tensor
    positions: Tensor
    nonfinite: Tensor
    mean: Tensor | None = None
    m2: Tensor | None = None
    mean_abs: Tensor | None = None
    max: Tensor | None = None
    active: Tensor | None = None

    @classmethod
    def empty(
        cls,
        num_classes: int,
        neurons: int,
        statistics: Iterable[str] = STATISTICS,
        device: torch.device | str | None = None,
    ) -> ClassStats:
        """The neutral state.

        Raises:
            ValueError: for an unknown statistic, ``m2`` without ``mean``, or a negative size.
        """
        wanted = set(statistics)
        if unknown := sorted(wanted - set(STATISTICS)):
            raise ValueError(f"ClassStats: statistics must be among {STATISTICS}, got {unknown}")
        if "m2" in wanted and "mean" not in wanted:
            raise ValueError("ClassStats: statistics with 'm2' must also hold 'mean'")
        if num_classes < 0 or neurons < 0:
            raise ValueError(
                f"ClassStats: num_classes and neurons must not be negative, "
                f"got {num_classes} and {neurons}"
            )

        def plane(name: str, dtype: torch.dtype, value: float) -> Tensor | None:
            if name not in wanted:
                return None
            return torch.full((num_classes, neurons), value, dtype=dtype, device=device)

        return cls(
            count=torch.zeros(num_classes, dtype=torch.float64, device=device),
            positions=torch.zeros(num_classes, dtype=torch.float64, device=device),
            nonfinite=torch.zeros(neurons, dtype=torch.int64, device=device),
            mean=plane("mean", torch.float64, 0.0),
            m2=plane("m2", torch.float64, 0.0),
            mean_abs=plane("mean_abs", torch.float32, 0.0),
            max=plane("max", torch.float32, -torch.inf),
            active=plane("active", torch.float32, 0.0),
        )

    @property
    def num_classes(self) -> int:
        return self.count.shape[0]

    @property
    def neurons(self) -> int:
        return self.nonfinite.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the state holds, by name."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def variance(self) -> Tensor:
        """Variance of ``a[n, c]`` within each class, float64 ``[K, C]``; 0 where it is empty."""
        if self.m2 is None:
            raise ValueError("ClassStats: the variance needs the statistic 'm2'")
        return self.m2 / self.count.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(1)


def class_order(labels: Tensor, num_classes: int) -> ClassOrder:
    """Orders samples by class with a stable counting sort, once per batch.

    Args:
        labels: int64 ``[N]``, each in ``[0, num_classes)`` or ``-100`` for samples to ignore; or
            soft labels, floating point ``[N, K]``: how much of each sample belongs to each class,
            finite and not negative. A row of zeros is a sample to ignore.
        num_classes: ``K``.

    Returns:
        ``order`` int64 ``[N]``, a permutation with the ignored samples last, and ``offsets``
        int64 ``[K + 1]``; with soft labels ``order`` is ``[K * N]``, and there are shares.

    Raises:
        TypeError: if labels are neither int64 nor floating point.
        ValueError: if labels have another shape, or (on the CPU) are out of range. On CUDA a
            label out of range is ignored like ``-100``, because looking at it would wait for the
            device.
    """
    if not labels.is_floating_point():
        return ClassOrder(*torch.ops.neusemslice.class_order(labels, num_classes))
    if labels.ndim != 2 or labels.shape[1] != num_classes:
        raise ValueError(
            f"class_order: soft labels must be [N, {num_classes}], got {list(labels.shape)}"
        )
    samples = labels.shape[0]
    return ClassOrder(
        torch.arange(samples, device=labels.device).repeat(num_classes),
        torch.arange(num_classes + 1, device=labels.device) * samples,
        labels.detach().t().double().flatten(),
    )


def class_stats_(
    state: ClassStats,
    x: Tensor,
    order: ClassOrder,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    neuron_dim: int = 1,
) -> None:
    """Adds a batch to ``state``, in place, in one pass over ``x``.

    Dimension 0 of ``x`` holds samples, ``neuron_dim`` neurons, the others positions:
    ``[N, C]`` and ``[N, C, H, W]`` with ``neuron_dim=1``, ``[N, T, C]`` with ``neuron_dim=-1``.
    ``mean`` and ``m2`` are of ``a[n, c]``, the mean over the positions that the mask keeps;
    ``mean_abs``, ``max`` and ``active`` are over positions. Where every token has its own label,
    flatten to ``[N * T, C]``.

    Sums are in a fixed order, in float64 or (up to eight rows of squares and absolute values at a
    time) in float32: the result has the same bits each time, at any number of threads and on any
    CPU. Class moments are merged as in Chan, Golub, LeVeque (1979).

    Args:
        state: of ``K`` classes and ``C`` neurons.
        x: float64, float32, float16 or bfloat16 with ``C`` neurons; any strides.
        order: what ``class_order`` gave for the batch's labels.
        weight: floating point ``[N]``, finite and not negative; 0 skips the sample. With soft
            labels a sample enters each class with weight times share.
        mask: bool, the shape of ``x`` without ``neuron_dim``; False drops the position. A sample
            without a position left is skipped.
        neuron_dim: where the neurons are.

    A value that is NaN or infinite is counted in ``state.nonfinite`` (once for each class of its
    sample) and enters the sums as 0 and the maximum not at all.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device, or (on the CPU) a wrong weight, share or order.
            Nothing has changed then.
    """
    torch.ops.neusemslice.class_stats_(
        state.count,
        state.positions,
        state.nonfinite,
        state.mean,
        state.m2,
        state.mean_abs,
        state.max,
        state.active,
        x,
        order.order,
        order.offsets,
        order.share,
        weight,
        mask,
        neuron_dim,
    )


def class_stats_many_(
    states: Sequence[ClassStats],
    xs: Sequence[Tensor],
    order: ClassOrder,
    *,
    weight: Tensor | None = None,
    masks: Sequence[Tensor | None] | None = None,
    neuron_dims: Sequence[int] | None = None,
) -> None:
    """Adds a batch to the states of several sites, in place: ``class_stats_`` for each of them.

    The bits are those of separate calls. On a GPU many small layers share their launches.

    Args:
        states: one for each site, of ``K`` classes, all with the same statistics.
        xs: one for each site; the same samples in all of them.
        order: what ``class_order`` gave for the batch's labels.
        weight: as for ``class_stats_``.
        masks: one for each site, None where it has none; by default no site has one.
        neuron_dims: one for each site; by default 1 for all.

    Raises:
        TypeError, ValueError: as ``class_stats_``, naming the site by its place; also if the lists
            differ in length, or states in their statistics. Nothing has changed then.
    """
    held = [tuple(state.tensors()) for state in states]
    for i, names in enumerate(held):
        if names != held[0]:
            raise ValueError(
                f"class_stats_many_: site {i}: the state must hold {list(held[0])} as that of "
                f"site 0, got {list(names)}"
            )
    present = held[0] if held else ()
    planes = [
        [getattr(state, name) for state in states] if name in present else []
        for name in ("count", "positions", "nonfinite", *STATISTICS)
    ]
    torch.ops.neusemslice.class_stats_many_(
        *planes,
        list(xs),
        order.order,
        order.offsets,
        order.share,
        weight,
        [None] * len(xs) if masks is None else list(masks),
        [1] * len(xs) if neuron_dims is None else list(neuron_dims),
    )


def class_stats_merge_(state: ClassStats, other: ClassStats) -> None:
    """Adds ``other`` to ``state``, in place.

    The empty state is neutral; merging is associative up to rounding.

    Raises:
        ValueError: if the two differ in size, device or statistics. Nothing has changed then.
    """
    torch.ops.neusemslice.class_stats_merge_(
        state.count,
        state.positions,
        state.nonfinite,
        state.mean,
        state.m2,
        state.mean_abs,
        state.max,
        state.active,
        other.count,
        other.positions,
        other.nonfinite,
        other.mean,
        other.m2,
        other.mean_abs,
        other.max,
        other.active,
    )


@register_fake("class_order")
def _class_order_fake(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    return labels.new_empty(labels.shape), labels.new_empty(num_classes + 1)


@register_fake("class_stats_")
def _class_stats_fake(*arguments: object) -> None:
    check_one_device("class_stats_", *arguments)


@register_fake("class_stats_many_")
def _class_stats_many_fake(*arguments: object) -> None:
    check_one_device("class_stats_many_", *arguments)


@register_fake("class_stats_merge_")
def _class_stats_merge_fake(*arguments: object) -> None:
    check_one_device("class_stats_merge_", *arguments)
