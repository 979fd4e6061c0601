"""AdamW over tuned rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from neusemslice import ops
from neusemslice.optim._masked import MaskedOptimizer, OperatorCall


class MaskedAdamW(MaskedOptimizer):
    """``torch.optim.AdamW`` for chosen rows of each parameter; the rest keeps its bits.

    A row is a slice of a parameter at one index of its neuron dimension. Moments are held for
    tuned rows only, in float32 (float64 for float64 parameters), and their bias is corrected by
    each row's own number of steps. Parameters without a gradient are skipped.

    Args:
        params: groups ``{"params": [...], "rows": [...], "neuron_dims": [...]}`` with an entry for
            each parameter: rising int64 indices or a bool mask over the neuron dimension, and that
            dimension. A group without ``rows``, or a plain list of parameters, is tuned whole.
        lr: a number, or a tensor of one element, which schedulers then change in place. On the
            parameters' device it is read by the kernel, and a captured CUDA graph follows it.
        betas: as in ``torch.optim.AdamW``.
        eps: likewise.
        weight_decay: likewise.
        amsgrad: likewise.
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"MaskedAdamW: betas[{i}] must lie in [0, 1), got {beta}")
        if not eps >= 0:
            raise ValueError(f"MaskedAdamW: eps must be at least 0, got {eps}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group["amsgrad"] else names

    def _update(self, group: dict[str, Any], call: OperatorCall) -> None:
        beta1, beta2 = group["betas"]
        ops.masked_adamw_(
            call.params,
            call.grads,
            call.states.get("exp_avg", []),
            call.states.get("exp_avg_sq", []),
            call.states.get("max_exp_avg_sq", []),
            call.states.get("master", []),
            call.steps,
            call.rows,
            call.neuron_dims,
            call.lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            grad_scale=call.grad_scale,
            found_inf=call.found_inf,
        )
