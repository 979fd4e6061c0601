"""gram_ against what torch's operators take for the same matrix.

python -m bench.gram            all sizes, writes bench/results/
python -m bench.gram --quick    small sizes, few rounds, nothing written

The last line is one JSON object. Per workload: `limit`, the share of our time in which a plain
float32 product of the rows does the multiply-adds of one triangle; `vs_float64`, how many times
longer the same exactness takes with torch's float64; `vs_float32`, the same in float32, which loses
the digits of what is far from zero.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rich.console import Console
from torch import Tensor

from bench import harness
from bench.device import use_device
from bench.report import Column, Ratio, Result, Section
from neusemslice import ops, reference
from neusemslice.ops import Gram

COLUMNS = (
    Column("ms", "ms", "number"),
    Column("limit", "of limit", "share", in_summary=True),
    Column("vs_float64", "× float64", "times", in_summary=True),
    Column("vs_float32", "× float32", "times", in_summary=True),
)
NOTE = (
    "Sums of products about the mean, float64, of float32 rows. “of limit”: the time of a plain "
    "float32 product of the rows, halved, over ours. float64, float32: the mean is subtracted from "
    "the rows, which are multiplied in that type and added to the matrix."
)
SIZES = {
    "rows of a linear layer, 4,096 × 1,024": (4096, 1024),
    "windows of a convolution, 65,536 × 289": (65_536, 289),
    "a wide layer, 4,096 × 4,096": (4096, 4096),
}


def torch_gram(x: Tensor, total: Tensor, dtype: torch.dtype) -> None:
    wide = x.to(dtype)
    wide = wide - wide.mean(0)
    total += wide.t() @ wide


def measure(name: str, rows: int, features: int, rounds: int, patience: float) -> Result:
    x = torch.randn(rows, features) + 3
    some = x[:2000, :40]
    states = [Gram.empty(40) for _ in range(2)]
    for state in states:
        ops.gram_(state, some)
    with torch.device("cpu"):
        expected = reference.gram(some.cpu())[2]
    torch.testing.assert_close(states[0].products.cpu(), expected, rtol=1e-6, atol=2e-3)
    harness.same_bits({"products": states[0].products}, {"products": states[1].products})

    state, total = Gram.empty(features), torch.zeros(features, features, dtype=torch.float64)
    runs = {
        "ours": lambda _: ops.gram_(state, x),
        "float64": lambda _: torch_gram(x, total, torch.float64),
        "float32": lambda _: torch_gram(x, total, torch.float32),
        "product": lambda _: torch.mm(x.t(), x),
    }
    clocks = {key: harness.clock(run) for key, run in runs.items()}
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        harness.wait_until_quiet(patience)
        for key, clock in clocks.items():
            times[key].append(clock(0))

    def ratio(key: str, share: float = 1.0) -> Ratio:
        pairs = zip(times[key], times["ours"], strict=True)
        return Ratio.of([share * other / own for other, own in pairs])

    return Result(
        name,
        {
            "ms": 1e3 * statistics.median(times["ours"]),
            "limit": ratio("product", 0.5),
            "vs_float64": ratio("float64"),
            "vs_float32": ratio("float32"),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    quick = parser.parse_args().quick
    use_device()
    console = Console(width=160)
    section = Section("gram", "Gram matrices", NOTE, COLUMNS, [])
    for name, (rows, features) in SIZES.items():
        torch.manual_seed(0)
        size = (rows // 8, features) if quick else (rows, features)
        result = measure(name, *size, 3 if quick else 9, 0.5 if quick else 5.0)
        section.results.append(result)
        console.print(f"{name}: done", style="dim")
    section.show(console)
    if not quick:
        console.print(f"written: {section.write().name}")
    print(section.summary())


if __name__ == "__main__":
    main()
