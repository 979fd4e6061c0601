"""MaskedAdamW and MaskedSGD against memory and against torch's fused optimizers.

python -m bench.masked_optim            all, writes bench/results/
python -m bench.masked_optim --quick    small tensors, few rounds, nothing written

A share of the rows is tuned, chosen at random. The last line is one JSON object. Per workload, of
the operator: `limit`, the share of the physical limit; `vs_rows`, how many times longer it takes to
stream the same rows and their state without computing anything, on a processor. Of a whole
`step()`: `vs_hook`, how many times longer it takes to mask the gradients and let the dense fused
optimizer step, which is wrong: decay and momentum move the frozen rows; `vs_correct`, the fastest
of two ways that are right: gathered rows under the fused optimizer, scattered back, and the mask
with the frozen rows restored afterwards; `vs_fused`, the dense fused optimizer alone, which tunes
everything.

What these ratios can be at most where memory is the limit: per weight, tuned or not, the hook and
the fused AdamW behind it move 36 bytes (SGD: 28), and gathered rows 44 to 48 for each tuned weight,
where ours moves 28 (20). Of a tenth of the rows that is 12.9 (14) and 1.7 times as much.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from bench import harness
from bench.device import ON_GPU, use_device
from bench.harness import CACHE_BYTES, Run, Workload
from bench.report import Column, Result, Section
from neusemslice import _C, ops, reference
from neusemslice.optim import MaskedAdamW, MaskedSGD

COLUMNS = (
    Column("ms", "ms", "number"),
    Column("gigabytes", "GB/s", "number"),
    Column("limit", "of limit", "share", in_summary=True),
    Column("vs_rows", "× same rows streamed", "times", in_summary=True),
    Column("step_ms", "step ms", "number"),
    Column("vs_hook", "× mask hook (wrong)", "times", in_summary=True),
    Column("vs_correct", "× correct", "times", in_summary=True),
    Column("vs_fused", "× dense fused", "times", in_summary=True),
    Column("correct", "fastest correct", "text"),
)
NOTE = (
    "Float32 parameters with full gradients. First the operator alone; “of limit”: the time in "
    "which memory moves the same bytes (per tuned weight 28 with AdamW, 20 with SGD) with the same "
    "mix of reads and writes, front to back, over ours; “same rows streamed”: the same rows and "
    "their state, read and rewritten where they lie. Then one whole `step()`. Masking gradients is "
    "wrong: decay and momentum move frozen rows."
)


@dataclass
class Kind:
    """An optimizer: ours, torch's, and how it is asked for."""

    masked: type[torch.optim.Optimizer]
    dense: type[torch.optim.Optimizer]
    options: dict[str, Any]
    states: tuple[str, ...]
    oracle: Callable[..., dict[str, Tensor]]
    operator: Callable[[Setting], None]


KINDS = {
    "AdamW": Kind(
        MaskedAdamW,
        torch.optim.AdamW,
        {"lr": 1e-3, "weight_decay": 1e-2},
        ("exp_avg", "exp_avg_sq"),
        lambda param, grad, rows, options: reference.masked_adamw(
            param,
            grad,
            torch.zeros(len(rows), param.shape[1]),
            torch.zeros(len(rows), param.shape[1]),
            None,
            torch.zeros(len(rows)),
            rows,
            0,
            **options,
        ),
        lambda own: ops.masked_adamw_(
            own.params,
            own.gradients,
            own.state("exp_avg"),
            own.state("exp_avg_sq"),
            [],
            [],
            own.state("step"),
            own.rows,
            own.dims,
            own.lr,
            **own.options,
        ),
    ),
    "SGD": Kind(
        MaskedSGD,
        torch.optim.SGD,
        {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4},
        ("momentum_buffer",),
        lambda param, grad, rows, options: reference.masked_sgd(
            param,
            grad,
            torch.zeros(len(rows), param.shape[1]),
            torch.zeros(len(rows)),
            rows,
            0,
            **options,
        ),
        lambda own: ops.masked_sgd_(
            own.params,
            own.gradients,
            own.state("momentum_buffer"),
            [],
            own.state("step"),
            own.rows,
            own.dims,
            own.lr,
            **own.options,
        ),
    ),
}


def with_gradients(tensors: list[Tensor], gradients: list[Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(t) for t in tensors]
    for p, grad in zip(params, gradients, strict=True):
        p.grad = grad
    return params


class Setting:
    """Parameters with gradients of which a share of the rows is tuned, in each of the ways."""

    def __init__(self, kind: Kind, count: int, size: int, share: float) -> None:
        self.kind = kind
        tuned = max(1, round(share * size))
        self.gradients = [torch.randn(size, size) for _ in range(count)]
        self.params = with_gradients(
            [torch.randn(size, size) for _ in range(count)], self.gradients
        )
        self.rows = [torch.randperm(size)[:tuned].sort().values for _ in range(count)]
        self.dims = [0] * count
        self.options = {key: value for key, value in kind.options.items() if key != "lr"}
        self.lr = torch.tensor(kind.options["lr"], dtype=torch.float64, device="cpu")
        self.ours = self.masked(self.params)
        self.compact = [
            nn.Parameter(p.detach()[r]) for p, r in zip(self.params, self.rows, strict=True)
        ]
        self.gathered = self.fused(self.compact)

    def state(self, name: str) -> list[Tensor]:
        """Of our optimizer, which has it after a first step."""
        return [self.ours.state[p][name] for p in self.params]

    def masked(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return self.kind.masked([{"params": params, "rows": self.rows}], **self.kind.options)

    def fused(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        # A captured graph needs the number of steps on the device.
        capturable = {"capturable": True} if ON_GPU and "exp_avg" in self.kind.states else {}
        return self.kind.dense(params, **self.kind.options, **capturable, fused=True)

    def step_gathered(self) -> None:
        for p, own, rows in zip(self.params, self.compact, self.rows, strict=True):
            assert p.grad is not None
            own.grad = p.grad.index_select(0, rows)
        self.gathered.step()
        with torch.no_grad():
            for p, own, rows in zip(self.params, self.compact, self.rows, strict=True):
                p.index_copy_(0, rows, own)


class Dense:
    """The ways over whole parameters."""

    def __init__(self, setting: Setting) -> None:
        self.params = with_gradients(
            [p.detach().clone() for p in setting.params], [g.clone() for g in setting.gradients]
        )
        self.optimizer = setting.fused(self.params)
        self.masks, self.frozen = [], []
        for p, rows in zip(self.params, setting.rows, strict=True):
            mask = torch.zeros(p.shape[0], 1)
            mask[rows] = 1
            self.masks.append(mask)
            self.frozen.append((mask[:, 0] == 0).nonzero().flatten())
        self.saved = [p.detach()[f] for p, f in zip(self.params, self.frozen, strict=True)]

    def hook(self) -> None:
        for p, mask in zip(self.params, self.masks, strict=True):
            assert p.grad is not None
            p.grad.mul_(mask)
        self.optimizer.step()

    def restored(self) -> None:
        self.hook()
        with torch.no_grad():
            for p, frozen, saved in zip(self.params, self.frozen, self.saved, strict=True):
                p.index_copy_(0, frozen, saved)


def check(kind: Kind, count: int, size: int, share: float) -> None:
    """Compares all ways with float64 in some columns, and ours with itself and the frozen rows."""
    torch.manual_seed(1)
    setting = Setting(kind, count, size, share)
    before = [p.detach().clone() for p in setting.params]
    dense = Dense(setting)
    again = with_gradients([b.clone() for b in before], setting.gradients)
    setting.ours.step()
    setting.masked(again).step()
    found = [p.detach().clone() for p in setting.params]
    setting.step_gathered()
    dense.restored()
    some = slice(0, 16)
    for i, rows in enumerate(setting.rows):
        harness.same_bits({"parameter": found[i]}, {"parameter": again[i].detach()})
        untouched = torch.ones(size, dtype=torch.bool).index_fill(0, rows, False)
        for way in (found[i], setting.params[i].detach(), dense.params[i].detach()):
            if not torch.equal(way[untouched], before[i][untouched]):
                raise AssertionError(f"frozen rows of parameter {i} moved")
            with torch.device("cpu"):
                own = (t[:, some].cpu() for t in (before[i], setting.gradients[i]))
                expected = kind.oracle(*own, rows.cpu(), kind.options)
            torch.testing.assert_close(
                way[:, some].cpu().double(), expected["param"], rtol=1e-6, atol=1e-6
            )


def workloads(
    name: str, kind: Kind, count: int, size: int, share: float, rotated: int = 8 * CACHE_BYTES
) -> tuple[Workload, Workload]:
    """The operator and a whole step of an optimizer, over square parameters; buffers of all ways
    rotate over so many bytes."""
    torch.manual_seed(0)
    bytes_each = 4 * count * size * max(1, round(share * size))
    copies, wholes = (
        rotated // ((2 + len(kind.states)) * 4 * count * size * rows) + 1
        for rows in (max(1, round(share * size)), size)
    )
    settings = [Setting(kind, count, size, share) for _ in range(copies)]
    for setting in settings:
        setting.ours.step()
    dense = [Dense(setting) for setting in settings[:wholes]]

    def called(ours: Run, check: Callable[[], None], peers: dict[str, dict[str, Run]]) -> Workload:
        updated = (1 + len(kind.states)) * bytes_each
        return Workload(name, bytes_each, updated, ours, check, peers, updates_rotate=True)

    correct: dict[str, Run] = {
        "gathered rows": lambda call: settings[call % copies].step_gathered()
    }
    if share < 1:
        correct["restored"] = lambda call: dense[call % wholes].restored()
    streamed = {} if ON_GPU else {"rows": {"rows": rows_streamed(settings)}}
    return called(
        lambda call: kind.operator(settings[call % copies]), lambda: None, streamed
    ), called(
        lambda call: settings[call % copies].ours.step(),
        lambda: check(kind, count, size, share),
        {
            "hook": {"hook": lambda call: dense[call % wholes].hook()},
            "correct": correct,
            "fused": {"fused": lambda call: dense[call % wholes].optimizer.step()},
        },
    )


def rows_streamed(settings: list[Setting]) -> Run:
    """Streams the rows that are tuned, and as much state as they have."""

    def words(tensors: Iterable[Tensor]) -> list[Tensor]:
        return [t.detach().view(torch.int64) for t in tensors]

    given = [
        (
            words(own.gradients),
            words(own.params),
            own.rows,
            words(torch.cat(of) for of in zip(*map(own.state, own.kind.states), strict=True)),
        )
        for own in settings
    ]
    return lambda call: _C.stream_rows(*given[call % len(given)])


def measure(
    name: str, kind: Kind, count: int, size: int, share: float, rounds: int, patience: float
) -> Result:
    """The operator's figures, then the step's."""
    operator, step = (
        harness.measure(workload, rounds, patience)
        for workload in workloads(name, kind, count, size, share)
    )
    whole = {k: v for k, v in step.values.items() if k.startswith("vs_") or k == "correct"}
    return Result(name, {**operator.values, "step_ms": step.values["ms"], **whole})


SIZES = {"4096²": (1, 4096), "200 × 512²": (200, 512)}
QUICK_SIZES = {"2048²": (1, 2048), "50 × 512²": (50, 512)}  # dense, still more than a cache holds
GPU_SIZES = {"8 × 8192²": (8, 8192)}  # twice, with all states, what fits beside each other
SHARES = (0.1, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small tensors, few rounds")
    quick = parser.parse_args().quick
    use_device()
    sizes = QUICK_SIZES if quick else GPU_SIZES if ON_GPU else SIZES
    console = Console(width=160)
    section = Section("masked_optim", "Optimizer steps over tuned rows", NOTE, COLUMNS, [])
    for kind_name, kind in KINDS.items():
        for size_name, (count, size) in sizes.items():
            for share in SHARES[::2] if quick else SHARES:
                name = f"{kind_name} {size_name} {share:.0%}"
                rounds, patience = (3, 0.2) if quick else (11, 5.0)
                section.results.append(measure(name, kind, count, size, share, rounds, patience))
                console.print(f"{name}: done", style="dim")
    section.show(console)
    if not quick:
        console.print(f"written: {section.write().name}")
    print(section.summary())


if __name__ == "__main__":
    main()
