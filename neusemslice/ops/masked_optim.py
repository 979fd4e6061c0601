"""Optimizer steps over tuned rows only (contract: ``csrc/ops/masked_optim.h``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neusemslice.ops._fake import check_one_device, register_fake


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    rows: Sequence[Tensor],
    neuron_dims: Sequence[int],
    lr: Tensor,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of ``torch.optim.SGD`` for the tuned rows of many parameters, in place.

    A row is a slice of a parameter at one index of its neuron dimension, of size ``D``. What does
    not belong to ``rows`` is neither read nor written. Arithmetic and state are float64 for
    float64 parameters, float32 for all others. No gradient flows through the step. The result
    has the same bits each time and at any number of threads.

    Args:
        params: float64, float32, float16 or bfloat16, of at least one dimension; any strides.
        grads: of the parameters' dtypes and shapes, or with ``D`` replaced by ``R``: the tuned
            rows alone. They are not changed.
        momentum_buffers: contiguous, the parameters' shapes with ``D`` replaced by ``R``; changed.
            Empty where ``momentum`` is 0.
        masters: empty, or where all parameters are float16 or bfloat16, the tuned rows in float32,
            shaped as the momentum; changed. The step is taken from them, and the parameter is
            their rounding.
        steps: float32 ``[R]``, how many updates each row has had; raised. A row at 0 takes its
            gradient as its momentum. Empty where ``momentum`` is 0.
        rows: int64 ``[R]``, rising, in ``[0, D)``.
        neuron_dims: each parameter's neuron dimension.
        lr: float64 or float32 ``[]``, on the CPU or on the parameters' device. Only the latter is
            followed by a captured CUDA graph.
        momentum: as in ``torch.optim.SGD``.
        dampening: likewise.
        weight_decay: likewise.
        nesterov: likewise; needs a momentum and no dampening.
        maximize: likewise.
        grad_scale: float32, one element; the gradients are divided by it on the fly.
        found_inf: float32, one element; unless it is 0, nothing changes.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong length, shape, device or option, or (on the CPU) wrong rows.
            Nothing has changed then. On CUDA a row out of range is skipped, because looking at it
            would wait for the device.
    """
    torch.ops.neusemslice.masked_sgd_(
        params,
        grads,
        momentum_buffers,
        masters,
        steps,
        rows,
        neuron_dims,
        lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    rows: Sequence[Tensor],
    neuron_dims: Sequence[int],
    lr: Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decoupled_weight_decay: bool = True,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """A step of ``torch.optim.AdamW`` or ``Adam`` for tuned rows of many parameters, in place.

    Parameters, gradients, rows, ``lr``, ``grad_scale`` and ``found_inf`` are those of
    ``masked_sgd_``, and so are the guarantees and the errors.

    Args:
        params: see ``masked_sgd_``.
        grads: see ``masked_sgd_``.
        exp_avgs: contiguous, the parameters' shapes with ``D`` replaced by ``R``; changed.
        exp_avg_sqs: likewise.
        max_exp_avg_sqs: likewise; empty without ``amsgrad``.
        masters: see ``masked_sgd_``.
        steps: float32 ``[R]``, how many updates each row has had; raised. Bias is corrected by it,
            row for row.
        rows: see ``masked_sgd_``.
        neuron_dims: see ``masked_sgd_``.
        lr: see ``masked_sgd_``.
        beta1: as in ``torch.optim.AdamW``, in ``[0, 1)``.
        beta2: likewise.
        eps: as in ``torch.optim.AdamW``.
        weight_decay: likewise.
        decoupled_weight_decay: without it the decay is part of the gradient, as in
            ``torch.optim.Adam``.
        amsgrad: as in ``torch.optim.AdamW``.
        maximize: likewise.
        grad_scale: see ``masked_sgd_``.
        found_inf: see ``masked_sgd_``.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong length, shape, device or option, or (on the CPU) wrong rows.
            Nothing has changed then.
    """
    torch.ops.neusemslice.masked_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        masters,
        steps,
        rows,
        neuron_dims,
        lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


# `lr` alone may lie elsewhere than the parameters: on the CPU.


@register_fake("masked_sgd_")
def _masked_sgd_fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    rows: Sequence[Tensor],
    neuron_dims: Sequence[int],
    lr: Tensor,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **options: float,
) -> None:
    lists = (params, grads, momentum_buffers, masters, steps, rows)
    check_one_device("masked_sgd_", *lists, grad_scale, found_inf)


@register_fake("masked_adamw_")
def _masked_adamw_fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    rows: Sequence[Tensor],
    neuron_dims: Sequence[int],
    lr: Tensor,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **options: float,
) -> None:
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps, rows)
    check_one_device("masked_adamw_", *lists, grad_scale, found_inf)
