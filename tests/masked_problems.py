"""Parameters with gradients, state and tuned rows, and a step of an operator beside its oracle."""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neusemslice import ops, reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "sliced", "permuted", "requires_grad"]
SGD = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "maximize": True},
    "momentum": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
}
ADAMW = {
    "plain": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3},
    "amsgrad": {"amsgrad": True, "maximize": True},
    "slow": {"beta1": 0.3, "beta2": 0.5},
    "coupled": {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True},
}
OPTIONS = [("sgd", name) for name in SGD] + [("adamw", name) for name in ADAMW]


@dataclass
class Problem:
    """Parameters with gradients and state, and one step over all of them."""

    kind: str
    options: dict
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=lambda: [[], [], []])
    masters: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    dims: list[int] = field(default_factory=list)
    lr: Tensor = field(default_factory=lambda: torch.tensor(0.05, dtype=torch.float64))

    @property
    def names(self) -> list[str]:
        if self.kind == "sgd":
            return ["momentum_buffer"] if self.options.get("momentum") else []
        extra = ["max_exp_avg_sq"] if self.options.get("amsgrad") else []
        return ["exp_avg", "exp_avg_sq", *extra]

    def add(
        self,
        param: Tensor,
        rows: list[int],
        dim: int = 0,
        steps: float = 0,
        compact: bool = False,
        master: bool = False,
    ) -> "Problem":
        index = torch.tensor(rows, dtype=torch.int64, device=param.device)
        shape = list(param.shape)
        shape[dim] = len(rows)
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32

        def random(size, dtype):
            values = torch.randn(size, dtype=torch.float64, device=param.device)
            return values.to(dtype)

        self.params.append(param)
        self.grads.append(random(shape if compact else list(param.shape), param.dtype))
        if self.names:
            counts = torch.full((len(rows),), steps, dtype=torch.float32, device=param.device)
            self.steps.append(counts)
        for kind in range(len(self.names)):
            state = random(shape, dtype).abs() if steps else torch.zeros(shape, dtype=dtype)
            self.states[kind].append(state.to(param.device))
        if master:
            # More than the parameter can hold, and the parameter its rounding, as after a step.
            exact = param.detach().index_select(dim, index).float()
            exact = exact * (1 + torch.rand_like(exact) * torch.finfo(param.dtype).eps / 8)
            param.detach().index_copy_(dim, index, exact.to(param.dtype))
            self.masters.append(exact.contiguous())
        self.rows.append(index)
        self.dims.append(dim)
        return self

    @property
    def arguments(self) -> tuple:
        kinds = 1 if self.kind == "sgd" else 3
        return (
            self.params,
            self.grads,
            *self.states[:kinds],
            self.masters,
            self.steps,
            self.rows,
            self.dims,
            self.lr,
        )

    def step(self, **scalars) -> None:
        op = ops.masked_sgd_ if self.kind == "sgd" else ops.masked_adamw_
        op(*self.arguments, **self.options, **scalars)

    def expected(self, grad_scale: float = 1.0) -> list[dict[str, Tensor]]:
        """What the oracle makes of every parameter."""
        results = []
        for i, param in enumerate(self.params):
            states = [kind[i].cpu() if kind else None for kind in self.states]
            call = {"sgd": reference.masked_sgd, "adamw": reference.masked_adamw}[self.kind]
            results.append(
                call(
                    param.detach().cpu(),
                    self.grads[i].cpu(),
                    *(states[:1] if self.kind == "sgd" else states),
                    self.steps[i].cpu() if self.steps else None,
                    self.rows[i].cpu(),
                    self.dims[i],
                    lr=self.lr.item(),
                    grad_scale=grad_scale,
                    master=self.masters[i].cpu() if self.masters else None,
                    **self.options,
                )
            )
        return results

    def tensors(self) -> list[Tensor]:
        """All that a step may change."""
        return [*self.params, *itertools.chain(*self.states), *self.masters, *self.steps]

    def copies(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.tensors()]

    def untouched(self, i: int) -> Tensor:
        """True where parameter `i` must keep its bits."""
        mask = torch.ones(self.params[i].shape, dtype=torch.bool)
        return mask.index_fill(self.dims[i], self.rows[i].cpu(), False)

    def check(self, scale: float = 1.0, **scalars) -> None:
        """Takes a step and compares everything with the oracle."""
        expected = self.expected(scale)
        before = self.copies()
        self.step(**scalars)
        for i, (param, wanted) in enumerate(zip(self.params, expected, strict=True)):
            # One rounding to the parameter's dtype, beside the arithmetic's own.
            state_dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
            rounding = 8 * torch.finfo(state_dtype).eps
            got, want = param.detach().cpu(), wanted["param"]
            torch.testing.assert_close(
                got.double(), want, rtol=torch.finfo(param.dtype).eps, atol=rounding
            )
            frozen = self.untouched(i)
            assert torch.equal(got[frozen], before[i].cpu()[frozen])
            for kind, name in enumerate(self.names):
                state = self.states[kind][i]
                assert state.dtype == state_dtype
                torch.testing.assert_close(
                    state.double().cpu(), wanted[name], rtol=rounding, atol=rounding
                )
            if self.masters:
                tuned = wanted["param"].index_select(self.dims[i], self.rows[i].cpu())
                master = self.masters[i].cpu()
                torch.testing.assert_close(master.double(), tuned, rtol=rounding, atol=rounding)
                assert torch.equal(
                    got.index_select(self.dims[i], self.rows[i].cpu()), master.to(got.dtype)
                )
            if self.names:
                assert self.steps[i].tolist() == wanted["step"].tolist()


def problem(kind: str, options: str | dict) -> Problem:
    named = {"sgd": SGD, "adamw": ADAMW}[kind]
    return Problem(kind, dict(named[options] if isinstance(options, str) else options))


def param_layouts(shape, dtype, device) -> dict[str, Tensor]:
    """One random parameter in the layouts that parameters come in."""
    x = torch.randn(*shape, dtype=torch.float64, device=device).to(dtype)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64, device=device).to(dtype)
    return {
        "contiguous": x,
        "sliced": wide[..., ::2],
        "permuted": x.transpose(0, -1).contiguous().transpose(0, -1),
        "requires_grad": x.clone().requires_grad_(),
    }
