"""Weight gradients of tuned rows against the whole weight's gradient and gathered channels.

python -m bench.rows            10, 25 and 100 % of the rows, writes bench/results/
python -m bench.rows --quick    small batches, few rounds, nothing written

The last line is one JSON object. Per workload: `limit`, the share of our time that a plain float32
product takes for the same multiply-adds, or memory for what must be read, whichever is longer;
`vs_whole`, how many times longer torch takes for the whole weight's gradient, of which the rows are
kept; `vs_gathered`, for the gradient of a layer that has the tuned rows alone, fed with their
gathered channels; of layers without groups.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from bench import harness
from bench.device import ON_GPU, use_device
from bench.harness import Reference, Workload
from bench.report import Column, Ratio, Result, Section
from neusemslice import ops

COLUMNS = (
    Column("ms", "ms", "number"),
    Column("gigaflops", "GFLOP/s", "number"),
    Column("limit", "of limit", "share", in_summary=True),
    Column("vs_whole", "× whole", "times", in_summary=True),
    Column("vs_gathered", "× gathered", "times", in_summary=True),
)
NOTE = (
    "float32, without TF32. “of limit”: over ours, the longer of the time in which a plain product "
    "does the same multiply-adds, and that in which memory reads the rows' gradient and the input. "
    "whole: torch's gradient of the whole weight, of which the rows are kept. gathered: torch's of "
    "a layer that has the tuned rows alone."
)
SHARES = (0.1, 0.25, 1.0)
PRODUCT = 8192 if ON_GPU else 1024

Backward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """A linear layer or a 3 × 3 convolution, and its batch.

    Attributes:
        samples: or positions, of a linear layer.
        size: of each side of a convolution's planes; None for a linear layer.
    """

    samples: int
    inputs: int
    outputs: int
    size: int | None = None
    groups: int = 1

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The gradient of its output, and its input."""
        space = () if self.size is None else (self.size, self.size)
        grad, x = (torch.randn(self.samples, n, *space) for n in (self.outputs, self.inputs))
        return grad, x

    def multiply_adds(self, rows: int) -> int:
        taps, places = (1, 1) if self.size is None else (9, self.size**2)
        return rows * self.inputs // self.groups * taps * self.samples * places

    def ours(self, grad: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        if self.size is None:
            return ops.rows_linear_backward(grad, x, rows)
        return ops.rows_conv_backward(grad, x, rows, (3, 3), (1, 1), (1, 1), (1, 1), self.groups)

    def whole(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.size is None:
            return grad.t() @ x
        weight = grad.new_empty(grad.shape[1], x.shape[1] // self.groups, 3, 3)
        where = ([1, 1], [1, 1], [1, 1], False, [0, 0], self.groups)
        gradients = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *where, [False, True, False]
        )
        return gradients[1]

    def ways(self) -> dict[str, Backward]:
        found: dict[str, Backward] = {
            "ours": self.ours,
            "whole": lambda grad, x, rows: self.whole(grad, x).index_select(0, rows),
        }
        if self.groups == 1:
            found["gathered"] = lambda grad, x, rows: self.whole(grad.index_select(1, rows), x)
        return found


def check(layer: Layer, grad: Tensor, x: Tensor, rows: Tensor) -> None:
    """Compares all ways with float64 on some samples, and ours with itself."""
    grad, x = grad[:4], x[:4]
    expected = layer.whole(grad.double(), x.double()).index_select(0, rows)
    terms = grad[:, 0].numel()
    for way in layer.ways().values():
        found = way(grad, x, rows).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2.4e-7 * terms)
    if not ON_GPU:  # cuDNN's sums may change their order
        again = {"gradient": layer.ours(grad, x, rows)}
        harness.same_bits({"gradient": layer.ours(grad, x, rows)}, again)


def measure(name: str, layer: Layer, share: float, rounds: int, patience: float) -> Result:
    torch.manual_seed(0)
    tuned = max(1, round(share * layer.outputs))
    rows = torch.randperm(layer.outputs)[:tuned].sort().values
    grad, x = layer.tensors()
    check(layer, grad, x, rows)

    own = grad.nbytes * tuned // layer.outputs
    # Of groups without a tuned row nothing must be read.
    needed = len((rows // (layer.outputs // layer.groups)).unique()) / layer.groups
    work = Workload(
        name,
        own + int(needed * x.nbytes),
        4 * layer.multiply_adds(tuned) // max(1, grad[:, 0].numel()),
        lambda _: None,
        lambda: None,
    )
    square = torch.randn(PRODUCT, PRODUCT)
    runs: dict[str, harness.Run] = {
        key: lambda _, way=way: way(grad, x, rows) for key, way in layer.ways().items()
    }
    runs |= {"product": lambda _: torch.mm(square, square), "memory": Reference(work)}
    clocks = {key: harness.clock(run) for key, run in runs.items()}
    times: dict[str, list[float]] = {key: [] for key in runs}
    for i in range(rounds):
        harness.wait_until_quiet(patience)
        for key, clock in clocks.items():
            times[key].append(clock(7 * i))

    part = layer.multiply_adds(tuned) / PRODUCT**3
    least = [
        max(part * product, memory)
        for product, memory in zip(times["product"], times["memory"], strict=True)
    ]
    typical = statistics.median(times["ours"])
    values = {
        "ms": typical * 1e3,
        "gigaflops": 2 * layer.multiply_adds(tuned) / typical / 1e9,
        "limit": Ratio.of([a / b for a, b in zip(least, times["ours"], strict=True)]),
    }
    for key in ("whole", "gathered"):
        if key in times:
            pairs = zip(times[key], times["ours"], strict=True)
            values[f"vs_{key}"] = Ratio.of([theirs / mine for theirs, mine in pairs])
    return Result(f"{name} {share:.0%}", values)


LAYERS = {
    "linear, 4,096 × 1,024 > 4,096": Layer(4096, 1024, 4096),
    "conv, 32 × 64 × 56² > 64": Layer(32, 64, 64, 56),
    "conv, 32 × 256 × 28² > 256 in 32 groups": Layer(32, 256, 256, 28, 32),
    "depthwise, 32 × 256 × 28²": Layer(32, 256, 256, 28, 256),
}
LAYERS_ON_GPU = {
    "linear, 16,384 × 4,096 > 16,384": Layer(16_384, 4096, 16_384),
    "conv, 512 × 64 × 56² > 64": Layer(512, 64, 64, 56),
    "conv, 512 × 256 × 28² > 256 in 32 groups": Layer(512, 256, 256, 28, 32),
    "depthwise, 512 × 256 × 28²": Layer(512, 256, 256, 28, 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds")
    quick = parser.parse_args().quick
    use_device()
    torch.backends.cudnn.allow_tf32 = False
    console = Console(width=160)
    section = Section("rows", "Weight gradients of tuned rows", NOTE, COLUMNS, [])
    for name, layer in (LAYERS_ON_GPU if ON_GPU else LAYERS).items():
        few = Layer(layer.samples // 16, layer.inputs, layer.outputs, layer.size, layer.groups)
        for share in SHARES[::2] if quick else SHARES:
            section.results.append(
                measure(name, few, share, 3, 0.2) if quick else measure(name, layer, share, 9, 5.0)
            )
            console.print(f"{section.results[-1].name}: done", style="dim")
    section.show(console)
    if not quick:
        console.print(f"written: {section.write().name}")
    print(section.summary())


if __name__ == "__main__":
    main()
