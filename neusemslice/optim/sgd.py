"""Stochastic gradient descent over tuned rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from neusemslice import ops
from neusemslice.optim._masked import MaskedOptimizer, OperatorCall


class MaskedSGD(MaskedOptimizer):
    """``torch.optim.SGD`` for chosen rows of each parameter; the rest keeps its bits.

    A row is a slice of a parameter at one index of its neuron dimension. Momentum is held for
    tuned rows only, in float32 (float64 for float64 parameters); it counts as
    ``torch.optim.SGD``'s does, from each row's own first step. Parameters without a gradient are
    skipped.

    Args:
        params: groups ``{"params": [...], "rows": [...], "neuron_dims": [...]}`` with an entry for
            each parameter: rising int64 indices or a bool mask over the neuron dimension, and that
            dimension. A group without ``rows``, or a plain list of parameters, is tuned whole.
        lr: a number, or a tensor of one element, which schedulers then change in place. On the
            parameters' device it is read by the kernel, and a captured CUDA graph follows it.
        momentum: as in ``torch.optim.SGD``.
        dampening: likewise.
        weight_decay: likewise.
        nesterov: likewise; needs a momentum and no dampening.
        maximize: likewise.

    Raises:
        TypeError: for a parameter or rows of a wrong dtype.
        ValueError: for an option out of range, or naming the parameter whose rows or neuron
            dimension do not fit it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        if not momentum >= 0:
            raise ValueError(f"MaskedSGD: momentum must be at least 0, got {momentum}")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"MaskedSGD: nesterov needs a momentum above 0 and no dampening, "
                f"got momentum {momentum} and dampening {dampening}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _update(self, group: dict[str, Any], call: OperatorCall) -> None:
        ops.masked_sgd_(
            call.params,
            call.grads,
            call.states.get("momentum_buffer", []),
            call.states.get("master", []),
            call.steps,
            call.rows,
            call.neuron_dims,
            call.lr,
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            grad_scale=call.grad_scale,
            found_inf=call.found_inf,
        )
