"""Similarity of sets and of rows against what people write today, and against faiss.

python -m bench.similarity            performance.md's sizes, writes bench/results/
python -m bench.similarity --quick    small sizes, few rounds, nothing written

The last line is one JSON object: per workload `vs_matmul` and `vs_faiss`, how many times longer
the float product with what follows it and faiss-cpu's exact search take, and `limit`, the share of
the time in which a plain product of the same rows does the multiply-adds of one triangle. Every
result is compared with float64 before it is timed. faiss brings a BLAS and an OpenMP of its own;
both are given as many threads as torch has. It is left out where it is missing, and on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bench import harness
from bench.device import ON_GPU, peak_memory, use_device
from bench.report import Column, Ratio, Result, Section, missing
from neusemslice import ops

TITLE = "Similarity"
COLUMNS = (
    Column("ms", "ms", "number"),
    Column("rate", "T pair-bits/s", "number"),
    Column("limit", "of limit", "share", in_summary=True),
    Column("vs_matmul", "× matmul", "times", in_summary=True),
    Column("vs_faiss", "× faiss", "times", in_summary=True),
    Column("memory", "peak MiB", "number"),
    Column("memory_matmul", "matmul's MiB", "number"),
    Column("memory_faiss", "faiss's MiB", "number"),
)
BLOCK = 1024
"""Rows of a block, where the full matrix of products would not fit."""

Neighbours = tuple[Tensor, Tensor]
Run = Callable[[], object]


WITH_FAISS = not ON_GPU and not missing("faiss")


def note() -> str:
    parts = [
        "Pairs of one tensor's rows, each pair once. “pair-bits”: pairs times elements of a set. "
        "“of limit”: the time of a plain float32 product of the rows, halved, over ours. Memory: "
        "by how much the process, or what is allocated on the GPU, grew beyond its inputs. matmul: "
        "products in float32, the formula, then nonzero or topk; in blocks of rows where the "
        "matrix does not fit."
    ]
    if ON_GPU:
        parts.append("Edges wait for the device, which has to say how many there are.")
    else:
        blas = "MKL" if torch.backends.mkl.is_available() else "another BLAS"
        parts.append(f"torch has {blas}.")
    if WITH_FAISS:
        import faiss

        parts.append(f"faiss: faiss-cpu {faiss.__version__}, IndexFlatIP, with OpenBLAS.")
    return " ".join(parts)


@dataclass
class Case:
    """What is timed, and how it is checked.

    Attributes:
        name: key of the result.
        ours: the operator.
        check: raises unless ours and the peers are right.
        peers: by the column that they belong to (without ``vs_``).
        product: seconds in which a plain product does the multiply-adds of all pairs.
        bits: pairs times elements, of sets.
        waits: whether ours and the peers wait for the device.
    """

    name: str
    ours: Run
    check: Run
    peers: dict[str, Run]
    product: Callable[[], float] | None = None
    bits: float | None = None
    rounds: int = field(default=9)
    waits: bool = False


def set_case(sets: int, size: int) -> Case:
    """Edges by Jaccard among noisy copies of 64 sets."""
    centres = torch.rand(64, size) < 0.5
    bits = centres[torch.randint(0, 64, (sets,))] ^ (torch.rand(sets, size) < 0.2)
    words = ops.bitset_pack(bits)
    threshold = 0.5

    def ours() -> ops.Edges:
        return ops.bitset_similarity_edges(words, threshold=threshold)

    def matmul() -> tuple[Tensor, Tensor]:
        x = bits.float()
        sizes = x.sum(1)
        common = x @ x.t()
        union = sizes.unsqueeze(1) + sizes - common
        similarity = common / union
        rows, cols = (similarity.triu_(1) >= threshold).nonzero(as_tuple=True)
        return rows, cols

    def check() -> None:
        x = bits.double()
        common = x @ x.t()
        sizes = x.sum(1)
        exact = common / (sizes.unsqueeze(1) + sizes - common)
        rows, cols = (exact.triu_(1) >= threshold).nonzero(as_tuple=True)
        for edges in (ours(), ours()):
            if not (torch.equal(edges.rows, rows) and torch.equal(edges.cols, cols)):
                raise AssertionError("the edges are not those of float64")
            if not torch.equal(edges.values, exact[rows, cols].float()):
                raise AssertionError("the edges' values are not those of float64")
        if len(matmul()[0]) != len(rows):
            raise AssertionError("the product finds other edges")

    name = f"Jaccard >= {threshold}, {sets:,} sets of {size:,}"
    bits_of_pairs = sets * (sets - 1) / 2 * size
    return Case(name, ours, check, {"matmul": matmul}, bits=bits_of_pairs, waits=True)


def nearest_sets_case(sets: int, size: int, k: int) -> Case:
    """The nearest of each set by Jaccard."""
    bits = torch.rand(sets, size) < 0.1
    words = ops.bitset_pack(bits)

    def ours() -> Neighbours:
        return ops.bitset_similarity_topk(words, k=k)

    def similarity(dtype: torch.dtype) -> Tensor:
        x = bits.to(dtype)
        sizes = x.sum(1)
        common = x @ x.t()
        return (common / (sizes.unsqueeze(1) + sizes - common)).fill_diagonal_(-1)

    def matmul() -> Neighbours:
        values, cols = similarity(torch.float32).topk(k)
        return cols, values

    def check() -> None:
        exact = similarity(torch.float64).topk(k).values.float()
        (cols, values), (again, _) = ours(), ours()
        if not torch.equal(values, exact) or not torch.equal(cols, again):
            raise AssertionError("the nearest sets are not those of float64, or not the same twice")

    name = f"Jaccard top-{k}, {sets:,} sets of {size:,}"
    pair_bits = sets * (sets - 1) / 2 * size
    return Case(name, ours, check, {"matmul": matmul}, bits=pair_bits)


def row_case(rows: int, size: int, k: int, *, with_faiss: bool, rounds: int) -> Case:
    """The nearest of each row, by cosine."""
    x = torch.randn(rows, size)

    def ours() -> Neighbours:
        return ops.pairwise_similarity_topk(x, k=k)

    def in_blocks() -> Neighbours:
        unit = F.normalize(x)
        found = []
        for first in range(0, rows, BLOCK):
            part = unit[first : first + BLOCK] @ unit.t()
            part.diagonal(first).fill_(-2)
            found.append(part.topk(k))
        values, cols = (torch.cat(part) for part in zip(*found, strict=True))
        return cols, values

    def matmul() -> Neighbours:
        unit = F.normalize(x)
        product = unit @ unit.t()
        values, cols = product.fill_diagonal_(-2).topk(k)
        return cols, values

    def search() -> Neighbours:
        import faiss

        unit = F.normalize(x).numpy()
        index = faiss.IndexFlatIP(size)
        index.add(unit)
        values, cols = index.search(unit, k + 1)  # a row is its own neighbour
        return torch.from_numpy(cols[:, 1:]), torch.from_numpy(values[:, 1:])

    # Where the matrix would take more than 4 GiB, nobody has it at once; and where that takes
    # minutes, nobody waits.
    peers: dict[str, Run] = {}
    if rows <= 2**18:
        peers["matmul"] = matmul if 4 * rows**2 < 2**32 else in_blocks
    if with_faiss and WITH_FAISS:
        peers["faiss"] = search

    def check() -> None:
        some = torch.randperm(rows)[:200]
        unit = F.normalize(x.double())
        exact = unit[some] @ unit.t()
        exact[torch.arange(len(some)), some] = -2
        best = exact.topk(k).values
        first, second = ours(), ours()
        if not all(map(torch.equal, first, second)):
            raise AssertionError("a second run gave other bits")
        for name, (cols, values) in {
            "ours": first,
            **{name: run() for name, run in peers.items()},
        }.items():
            torch.testing.assert_close(values[some].double(), best, rtol=0, atol=2e-6, msg=name)
            found = exact.gather(1, cols[some])
            torch.testing.assert_close(found, best, rtol=0, atol=2e-6, msg=name)

    def product() -> float:
        part = min(rows, 4 * BLOCK, 2**28 // rows)
        out = torch.empty(part, rows)
        if ON_GPU:
            took = harness.clock(lambda _: torch.mm(x[:part], x.t(), out=out), buffers=1)(0)
            return took * rows / part
        begin = time.perf_counter()
        torch.mm(x[:part], x.t(), out=out)
        return (time.perf_counter() - begin) * rows / part

    name = f"cosine top-{k}, {rows:,} rows of {size:,}"
    return Case(name, ours, check, peers, product=product, rounds=rounds)


def cases(quick: bool) -> list[Callable[[], Case]]:
    if quick:
        return [
            lambda: set_case(2048, 1000),
            lambda: set_case(2048, 100),
            lambda: row_case(2048, 1000, 10, with_faiss=False, rounds=3),
            lambda: row_case(8192, 64, 16, with_faiss=True, rounds=3),
        ]
    if ON_GPU:
        return [
            lambda: set_case(16384, 1024),
            lambda: nearest_sets_case(16384, 1024, 10),
            lambda: row_case(8192, 1000, 10, with_faiss=False, rounds=9),
            lambda: row_case(16384, 1000, 10, with_faiss=False, rounds=9),
            lambda: row_case(230_000, 32, 16, with_faiss=False, rounds=3),
            lambda: row_case(2_300_000, 32, 16, with_faiss=False, rounds=1),
        ]
    return [
        lambda: set_case(8192, 1000),
        lambda: set_case(8192, 100),
        lambda: row_case(8192, 1000, 10, with_faiss=True, rounds=9),
        lambda: row_case(100_000, 64, 16, with_faiss=True, rounds=3),
    ]


def peak_mebibytes(run: Run) -> float | None:
    """By how much a call grows the process at most; None where the system does not say."""
    if ON_GPU:
        with peak_memory() as found:
            run()
        return found[0]
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def kibibytes(key: str) -> int:
        lines = (line for line in status.read_text().splitlines() if line.startswith(key))
        return int(next(lines).split()[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the call would be given what others gave back
    reset.write_text("5")
    before = kibibytes("VmRSS")
    run()
    return (kibibytes("VmHWM") - before) / 1024


def clock(run: Run, waits: bool) -> Callable[[], float]:
    """What times a call."""
    if not ON_GPU:
        return lambda: seconds(run)
    timed = harness.clock(lambda _: run(), captured=not waits, buffers=1)
    return lambda: timed(0)


def seconds(run: Run, least: float = 0.3) -> float:
    """Shortest time of a call, of enough calls to fill `least` seconds."""
    times: list[float] = []
    while sum(times) < least and len(times) < 5:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure(case: Case, patience: float, rounds: int) -> Result:
    case.check()
    result = Result(case.name, {"memory": peak_mebibytes(case.ours)})
    for name, run in case.peers.items():
        result.values[f"memory_{name}"] = peak_mebibytes(run)
    ours = clock(case.ours, case.waits)
    peers = {name: clock(run, case.waits) for name, run in case.peers.items()}
    own: list[float] = []
    shares: list[float] = []
    slower: dict[str, list[float]] = {name: [] for name in case.peers}
    for _ in range(rounds):
        harness.wait_until_quiet(patience)
        before = case.product() if case.product else 0.0
        mine = ours()
        for name, peer in peers.items():
            slower[name].append(peer() / mine)
        if case.product:
            shares.append((before + case.product()) / 4 / mine)
        own.append(mine)
    typical = statistics.median(own)
    result.values["ms"] = typical * 1e3
    if case.bits:
        result.values["rate"] = case.bits / typical / 1e12
    if shares:
        result.values["limit"] = Ratio.of(shares)
    for name, ratios in slower.items():
        result.values[f"vs_{name}"] = Ratio.of(ratios)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    quick = parser.parse_args().quick
    use_device()
    if WITH_FAISS:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
    console = Console(width=160)
    section = Section("similarity", TITLE, note(), COLUMNS, [])
    for make in cases(quick):
        torch.manual_seed(0)
        case = make()
        section.results.append(
            measure(case, patience=0.5 if quick else 5.0, rounds=3 if quick else case.rounds)
        )
        console.print(f"{case.name}: done", style="dim")
        if not quick:
            section.write()
    section.show(console)
    print(section.summary())


if __name__ == "__main__":
    main()
