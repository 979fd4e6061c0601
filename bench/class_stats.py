"""class_stats_ against memory and against what people write today.

python -m bench.class_stats            all, writes bench/results/
python -m bench.class_stats --quick    some, few rounds, no torch.compile, nothing written

The last line is one JSON object: per workload the share of the physical limit, and how many times
longer the strongest composition of torch operators with preallocated buffers, the plain idiom, and
torch.compile take. The peers keep plain sums and sums of squares in float32: they do less work,
and lose the variance where the mean is far from zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from torch import Tensor

from bench import harness
from bench.device import ON_GPU, use_device
from bench.harness import Workload
from bench.report import Section
from neusemslice import ops
from neusemslice.ops import ClassStats

TITLE = "Class statistics"
NOTE = (
    "Count, mean, M2, mean |a|, maximum and active share; state 28 bytes per class and neuron. "
    "“of limit”: the time in which memory moves the same bytes, over ours."
)
STATE_BYTES = 28


@dataclass
class Sums:
    """What the peers accumulate: float32, ``[K, C]``."""

    total: Tensor
    squares: Tensor
    absolute: Tensor
    active: Tensor
    maximum: Tensor

    @classmethod
    def empty(cls, num_classes: int, neurons: int) -> Sums:
        planes = torch.zeros(4, num_classes, neurons)
        return cls(*planes.unbind(), torch.full((num_classes, neurons), -torch.inf))


@dataclass
class Pooled:
    """One row per sample, of the values that enter each of the sums."""

    mean: Tensor
    absolute: Tensor
    active: Tensor
    maximum: Tensor


Pool = Callable[[Tensor], Pooled]


def rows(x: Tensor) -> Pooled:
    values = x.float()
    return Pooled(values, values.abs(), (values > 0).float(), values)


def images(x: Tensor) -> Pooled:
    return Pooled(
        x.mean((2, 3)), x.abs().mean((2, 3)), (x > 0).float().mean((2, 3)), x.amax((2, 3))
    )


def tokens(mask: Tensor) -> Pool:
    keep = mask.unsqueeze(-1)
    share = (keep / keep.sum(1, keepdim=True)).float()

    def pool(x: Tensor) -> Pooled:
        return Pooled(
            (x * share).sum(1),
            (x.abs() * share).sum(1),
            ((x > 0) * share).sum(1),
            x.masked_fill(~keep, -torch.inf).amax(1),
        )

    return pool


def add_plain(sums: Sums, x: Tensor, labels: Tensor, pool: Pool) -> None:
    """The usual lines, with a fresh temporary in each."""
    pooled = pool(x)
    index = labels.unsqueeze(1).expand_as(pooled.mean)
    sums.total += torch.zeros_like(sums.total).index_add_(0, labels, pooled.mean)
    sums.squares += torch.zeros_like(sums.total).index_add_(0, labels, pooled.mean**2)
    sums.absolute += torch.zeros_like(sums.total).index_add_(0, labels, pooled.absolute)
    sums.active += torch.zeros_like(sums.total).index_add_(0, labels, pooled.active)
    sums.maximum = torch.maximum(
        sums.maximum,
        torch.full_like(sums.maximum, -torch.inf).scatter_reduce(0, index, pooled.maximum, "amax"),
    )


class Preallocated:
    """Rows added by class without a temporary: by index_add_, or by a one-hot product."""

    def __init__(self, shape: tuple[int, int], num_classes: int, product: bool) -> None:
        self.scratch = torch.empty(shape)
        self.values = torch.empty(shape)
        self.one_hot = torch.empty(num_classes, shape[0]) if product else None

    def add(self, sums: Sums, x: Tensor, labels: Tensor) -> None:
        if self.one_hot is not None:
            self.one_hot.zero_().scatter_(0, labels.unsqueeze(0), 1.0)
        values = x if x.dtype == torch.float32 else self.values.copy_(x)
        self._add(sums.total, labels, values)
        self._add(sums.squares, labels, torch.mul(values, values, out=self.scratch))
        self._add(sums.absolute, labels, torch.abs(values, out=self.scratch))
        self._add(sums.active, labels, torch.gt(values, 0, out=self.scratch))
        sums.maximum.index_reduce_(0, labels, values, "amax")

    def _add(self, total: Tensor, labels: Tensor, values: Tensor) -> None:
        if self.one_hot is not None:
            total.addmm_(self.one_hot, values)
        else:
            total.index_add_(0, labels, values)


def oracle(x: Tensor, labels: Tensor, num_classes: int, neuron_dim: int, mask: Tensor | None):
    """Mean, M2, mean |a|, maximum and active share, two-pass, in float64."""
    values = x.movedim(neuron_dim, -1).double()
    values = values.reshape(values.shape[0], -1, values.shape[-1])
    keep = torch.ones(values.shape[:2], dtype=torch.bool) if mask is None else mask
    kept = keep.unsqueeze(-1)
    values = values.masked_fill(~kept, 0)
    positions = keep.sum(1).double()
    pooled = values.sum(1) / positions.unsqueeze(1)
    shape = (num_classes, pooled.shape[1])

    def by_class(samples: Tensor, weights: Tensor) -> Tensor:
        totals = torch.zeros(shape, dtype=torch.float64).index_add_(0, labels, samples)
        each = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, weights)
        return totals / each.clamp_min(1).unsqueeze(1)

    ones = torch.ones_like(positions)
    mean = by_class(pooled, ones)
    count = torch.bincount(labels, minlength=num_classes).double().unsqueeze(1)
    top = values.masked_fill(~kept, -torch.inf).amax(1)
    return {
        "mean": mean,
        "m2": by_class((pooled - mean[labels]) ** 2, ones) * count,
        "mean_abs": by_class(values.abs().sum(1), positions),
        "active": by_class((values > 0).sum(1).double(), positions),
        "max": torch.full(shape, -torch.inf, dtype=torch.float64).index_reduce_(
            0, labels, top, "amax"
        ),
    }


@dataclass
class Case:
    """One workload before its buffers exist."""

    name: str
    shape: tuple[int, ...]
    num_classes: int
    labels: str = "uniform"
    dtype: torch.dtype = torch.float32
    layout: str = "rows"
    compiled: bool = False
    quick: bool = False


CASES = [
    Case("fp32 K=10", (4096, 2048), 10, quick=True),
    Case("fp32 K=100", (4096, 2048), 100, compiled=True, quick=True),
    Case("fp32 K=1000", (4096, 2048), 1000, quick=True),
    Case("bf16 K=10", (4096, 2048), 10, dtype=torch.bfloat16),
    Case("bf16 K=100", (4096, 2048), 100, dtype=torch.bfloat16, quick=True),
    Case("bf16 K=1000", (4096, 2048), 1000, dtype=torch.bfloat16),
    Case("fp32 K=100 Zipf", (4096, 2048), 100, labels="zipf"),
    Case("fp32 K=100 one class", (4096, 2048), 100, labels="one"),
    Case("fp32 K=100 C=2047", (4096, 2047), 100),
    Case("tokens [8,512,1024] K=8 masked", (8, 512, 1024), 8, layout="tokens", quick=True),
    Case("tokens [8,512,1024] K=100 per token", (8, 512, 1024), 100, layout="flat"),
    Case("conv [256,512,14,14] K=100 NCHW", (256, 512, 14, 14), 100, layout="nchw", compiled=True),
    Case(
        "conv [256,512,14,14] K=100 channels_last",
        (256, 512, 14, 14),
        100,
        layout="channels_last",
        compiled=True,
    ),
]


MORE_ON_GPU = {"rows": 32, "tokens": 32, "flat": 32, "nchw": 4, "channels_last": 4}
"""How many times more samples a GPU gets, by layout: 400 MB at least."""


def on_gpu(case: Case) -> Case:
    """The same with as many samples as a GPU needs, and the shape in its name."""
    shape = (MORE_ON_GPU[case.layout] * case.shape[0], *case.shape[1:])
    name = case.name.split("[")[0].strip() if "[" in case.name else case.name
    suffix = case.name.partition("]")[2] if "[" in case.name else ""
    return replace(case, name=f"{name} {list(shape)}{suffix}".replace(", ", ","), shape=shape)


def draw_labels(kind: str, samples: int, num_classes: int) -> Tensor:
    if kind == "one":
        return torch.full((samples,), num_classes // 2)
    weights = torch.ones(num_classes)
    if kind == "zipf":
        weights /= torch.arange(1, num_classes + 1)
    return torch.multinomial(weights, samples, replacement=True)


def workload(case: Case, with_compile: bool) -> Workload:
    """Buffers, ours, and peers of one case."""
    item = torch.empty(0, dtype=case.dtype).element_size()
    size = item * torch.Size(case.shape).numel()
    inputs = [torch.randn(case.shape).to(case.dtype) for _ in range(harness.rotation(size))]
    if case.layout == "channels_last":
        inputs = [x.to(memory_format=torch.channels_last) for x in inputs]
    elif case.layout == "flat":
        inputs = [x.flatten(0, 1) for x in inputs]
    neuron_dim = -1 if case.layout == "tokens" else 1
    samples, neurons = inputs[0].shape[0], inputs[0].shape[neuron_dim]
    labels = [draw_labels(case.labels, samples, case.num_classes) for _ in inputs]
    orders = [ops.class_order(y, case.num_classes) for y in labels]
    mask = None
    pool: Pool = rows
    if case.layout == "tokens":
        real = torch.linspace(0.6, 1.0, samples) * case.shape[1]
        mask = torch.arange(case.shape[1]) < real.unsqueeze(1)
        pool = tokens(mask)
    elif inputs[0].dim() == 4:
        pool = images
    state = ClassStats.empty(case.num_classes, neurons)

    def pick(call: int) -> int:
        return call % len(inputs)

    def ours(call: int) -> None:
        i = pick(call)
        ops.class_stats_(state, inputs[i], orders[i], mask=mask, neuron_dim=neuron_dim)

    def check() -> None:
        states = []
        for _ in range(2):
            fresh = ClassStats.empty(case.num_classes, neurons)
            ops.class_stats_(fresh, inputs[0], orders[0], mask=mask, neuron_dim=neuron_dim)
            states.append(fresh.tensors())
        expected = oracle(inputs[0], labels[0], case.num_classes, neuron_dim, mask)
        for name, tensor in expected.items():
            torch.testing.assert_close(states[0][name].double(), tensor, rtol=1e-5, atol=1e-6)
        harness.same_bits(*states)
        expected_sum = expected["mean"] * states[0]["count"].unsqueeze(1)
        for name, run in {**strongest, "plain": plain}.items():
            sums[name] = Sums.empty(case.num_classes, neurons)
            run(0)
            torch.testing.assert_close(
                sums[name].total.double(), expected_sum, rtol=1e-2, atol=1e-2
            )

    sums: dict[str, Sums] = {}

    def peer(name: str, add: Callable[[Sums, Tensor, Tensor], None]) -> harness.Run:
        sums[name] = Sums.empty(case.num_classes, neurons)

        def run(call: int) -> None:
            add(sums[name], inputs[pick(call)], labels[pick(call)])

        return run

    def pooled_then(buffers: Preallocated) -> Callable[[Sums, Tensor, Tensor], None]:
        def add(target: Sums, x: Tensor, y: Tensor) -> None:
            pooled = pool(x)
            for total, part in (
                (target.total, pooled.mean),
                (target.squares, torch.mul(pooled.mean, pooled.mean, out=buffers.scratch)),
                (target.absolute, pooled.absolute),
                (target.active, pooled.active),
            ):
                total.index_add_(0, y, part)
            target.maximum.index_reduce_(0, y, pooled.maximum, "amax")

        return add

    plain = peer("plain", lambda target, x, y: add_plain(target, x, y, pool))
    if pool is rows:
        strongest = {
            name: peer(name, Preallocated((samples, neurons), case.num_classes, product).add)
            for name, product in (("index_add_", False), ("one-hot product", True))
            # The product's work grows with K, so that it stops being an option early.
            if not product or case.num_classes <= 100
        }
    else:
        buffers = Preallocated((samples, neurons), case.num_classes, product=False)
        strongest = {"reductions": peer("reductions", pooled_then(buffers))}
    peers = {"strongest": strongest, "plain": {"plain": plain}}
    if with_compile and case.compiled:
        compiled = torch.compile(lambda target, x, y: add_plain(target, x, y, pool))
        peers["compile"] = {"compile": peer("compile", compiled)}
    present = float(torch.stack([y.unique().numel() * torch.ones(()) for y in labels]).mean())
    kept = 1.0 if mask is None else float(mask.float().mean())
    return Workload(
        case.name,
        int(size * kept) + 8 * samples,
        int(present * neurons * STATE_BYTES),
        ours,
        check,
        peers,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="some workloads, few rounds")
    quick = parser.parse_args().quick
    use_device()
    console = Console(width=160)
    section = Section("class_stats", TITLE, NOTE, harness.COLUMNS, [])
    for case in map(on_gpu, CASES) if ON_GPU else CASES:
        if quick and not case.quick:
            continue
        torch.manual_seed(0)
        section.results.append(
            harness.measure(
                workload(case, with_compile=not quick),
                rounds=3 if quick else 15,
                patience=0.5 if quick else 5.0,
            )
        )
        torch.compiler.reset()
        console.print(f"{case.name}: done", style="dim")
        if not quick:
            section.write()
    section.show(console)
    print(section.summary())


if __name__ == "__main__":
    main()
