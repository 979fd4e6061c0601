"""Masked optimizers beside torch's own, on parameters as layers have them."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from neusemslice.optim import MaskedAdamW, MaskedSGD

OPTIMIZERS = {
    "sgd": (MaskedSGD, torch.optim.SGD, {"lr": 0.01}),
    "momentum": (MaskedSGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (
        MaskedSGD,
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adamw": (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.05}),
    "adam": (
        partial(MaskedAdamW, decoupled_weight_decay=False),
        torch.optim.Adam,
        {"lr": 1e-3, "weight_decay": 0.05},
    ),
    "coupled amsgrad": (
        partial(MaskedAdamW, decoupled_weight_decay=False),
        torch.optim.Adam,
        {"lr": 1e-3, "weight_decay": 0.05, "amsgrad": True, "eps": 1e-4},
    ),
    "dampened": (
        MaskedSGD,
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.8, "dampening": 0.3, "maximize": True},
    ),
    "amsgrad": (
        MaskedAdamW,
        torch.optim.AdamW,
        {"lr": 1e-3, "betas": (0.8, 0.99), "amsgrad": True, "maximize": True},
    ),
}
BOTH = pytest.mark.parametrize("name", ["nesterov", "amsgrad"])
EVERY = pytest.mark.parametrize("name", list(OPTIMIZERS))
STEPS = 1000

# Shape, neuron dimension and tuned rows of parameters as layers have them.
LAYERS = {
    "linear": ((12, 10), 0, [0, 3, 4, 11]),
    "bias": ((12,), 0, [0, 3, 4, 11]),
    "linear inputs": ((8, 12), 1, [0, 3, 4, 11]),
    "conv channels_last": ((8, 4, 3, 3), 0, [1, 7]),
    "conv inputs channels_last": ((6, 8, 3, 3), 1, [1, 7]),
    "conv3d inputs": ((4, 6, 2, 3, 3), 1, [0, 5]),
    "fused qkv": ((24, 8), -2, [0, 1, 8, 9, 16, 17]),
    "embedding": ((20, 6), -1, [2, 5]),
    "norm": ((8,), 0, [1, 7]),
    "nothing": ((5, 4), 0, []),
    "everything": ((3, 4), 0, [0, 1, 2]),
}


def parameters(device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for name, (shape, _, _) in LAYERS.items():
        values = torch.randn(shape, generator=generator).to(device)
        if "channels_last" in name:
            values = values.to(memory_format=torch.channels_last)
        made.append(nn.Parameter(values))
    return made


def group(params: list[nn.Parameter]) -> dict:
    return {
        "params": params,
        "rows": [rows for _, _, rows in LAYERS.values()],
        "neuron_dims": [dim for _, dim, _ in LAYERS.values()],
    }


def tuned(parameter: Tensor, rows: list[int], dim: int) -> Tensor:
    """True in the tuned rows."""
    mask = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    return mask.index_fill(dim, torch.tensor(rows, dtype=torch.int64, device=mask.device), True)


def gradients(device: torch.device, count: int = 40) -> list[list[Tensor]]:
    """Gradients of `count` steps for all parameters, the same in every run."""
    generator = torch.Generator().manual_seed(8)
    return [
        [torch.randn(shape, generator=generator).to(device) for shape, _, _ in LAYERS.values()]
        for _ in range(count)
    ]


class Twins:
    """The same parameters under a masked optimizer and under torch's own."""

    def __init__(self, name: str, device: torch.device, **options: object) -> None:
        masked, dense, settings = OPTIMIZERS[name]
        settings = {**settings, **options}
        self.before = [p.detach().clone() for p in parameters(device)]
        self.params, self.twins = parameters(device), parameters(device)
        self.masked = masked([group(self.params)], **settings)
        self.dense = dense(self.twins, **settings)
        self.gradients = gradients(device)

    def set_gradients(self, step: int) -> None:
        for p, twin, grad in zip(
            self.params, self.twins, self.gradients[step % len(self.gradients)], strict=True
        ):
            p.grad, twin.grad = grad.clone(), grad.clone()

    def accumulate_gradients(self, step: int) -> None:
        """Those of two backward passes."""
        for optimizer, params in ((self.masked, self.params), (self.dense, self.twins)):
            optimizer.zero_grad()
            for half in (2 * step, 2 * step + 1):
                own = self.gradients[half % len(self.gradients)]
                sum((p * g).sum() for p, g in zip(params, own, strict=True)).backward()

    def check(self, but: str = "") -> None:
        for (name, (_, dim, rows)), p, twin, before in zip(
            LAYERS.items(), self.params, self.twins, self.before, strict=True
        ):
            if name == but:
                continue
            mask = tuned(p, rows, dim)
            assert torch.equal(p[~mask], before[~mask]), name
            assert not mask.any() or not torch.equal(p[mask], before[mask]), name
            limit = 1e-6 * twin.abs().max()
            assert not mask.any() or (p - twin)[mask].abs().max() <= limit, name
            assert p.stride() == before.stride(), name


def simple(name="amsgrad", device="cpu", rows=(0, 2), **options):
    torch.manual_seed(3)
    p = nn.Parameter(torch.randn(4, 3, device=device))
    p.grad = torch.randn_like(p)
    masked, _, settings = OPTIMIZERS[name]
    groups = [{"params": [p], "rows": [list(rows)], "neuron_dims": [0]}]
    return p, masked(groups, **{**settings, **options})
