"""How the benchmarks measure, and how they report.

A workload is timed in rounds of {reference, ours, each peer, reference}. The reference moves the
same bytes, with the same mix of reads and writes, as fast as memory allows. What is reported is
the median over rounds of the ratios within a round: a shared machine changes its speed by far more
from minute to minute than within one round.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from neusemslice import _C

RESULTS = Path(__file__).parent / "results"
CACHE_BYTES = 32 * 2**20
COLUMNS = ("limit", "vs_strongest", "vs_plain", "vs_compile")
HEADINGS = {
    "limit": "of limit",
    "vs_strongest": "× strongest",
    "vs_plain": "× plain",
    "vs_compile": "× compile",
}

Run = Callable[[int], object]


@dataclass
class Workload:
    """What is timed. Each callable takes the number of the call, by which it picks its buffers.

    Attributes:
        name: key of the result.
        bytes_read: per call.
        bytes_updated: per call, of state that is read and written.
        ours: the operator.
        peers: by the column that they belong to (without ``vs_``); the fastest of a column counts.
        check: raises unless ours is right.
    """

    name: str
    bytes_read: int
    bytes_updated: int
    ours: Run
    check: Callable[[], None]
    peers: dict[str, dict[str, Run]] = field(default_factory=dict)


@dataclass
class Ratio:
    """Median over rounds, with the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Ratio:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


@dataclass
class Result:
    name: str
    milliseconds: float
    gigabytes_per_second: float
    ratios: dict[str, Ratio]
    strongest: str


class Reference:
    """Moves a workload's bytes at the speed of memory."""

    def __init__(self, bytes_read: int, bytes_updated: int) -> None:
        self.read = [
            torch.ones(bytes_read // 8, dtype=torch.int64) for _ in range(rotation(bytes_read))
        ]
        self.update = torch.ones(bytes_updated // 8, dtype=torch.int64)

    def __call__(self, call: int) -> object:
        return _C.stream_memory(self.read[call % len(self.read)], self.update)


def rotation(bytes_each: int) -> int:
    """How many buffers of a size hold more than eight times the last-level cache; at least 3."""
    return max(3, 8 * CACHE_BYTES // bytes_each + 1)


def seconds(run: Run, start: int, least: float = 0.04, most_calls: int = 12) -> float:
    """Shortest time of a call, of enough calls to fill `least` seconds.

    The shortest, because an operator waits for its slowest thread: another process on one core
    makes a call of 2 ms last a whole time slice.
    """
    times: list[float] = []
    while len(times) < 3 or (sum(times) < least and len(times) < most_calls):
        begin = time.perf_counter()
        run(start + len(times))
        times.append(time.perf_counter() - begin)
    return min(times)


def wait_until_quiet(most: float = 20.0) -> None:
    """Waits until other processes leave the processor alone, but not for ever."""
    give_up = time.monotonic() + most
    while time.monotonic() < give_up:
        begin, busy = time.monotonic(), _busy_seconds()
        time.sleep(0.1)
        if _busy_seconds() - busy < 0.1 * (time.monotonic() - begin):
            return


def _busy_seconds() -> float:
    """Processor time that was used so far, by all processes; 0 where the system does not say."""
    source = Path("/proc/stat")
    if not source.exists():
        return 0.0
    user, nice, system, _, _, *rest = map(int, source.read_text().split("\n")[0].split()[1:])
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


def measure(workload: Workload, rounds: int) -> Result:
    """Checks a workload, warms everything up, and times it."""
    workload.check()
    reference = Reference(workload.bytes_read, workload.bytes_updated)
    peers = [(kind, name, run) for kind, of in workload.peers.items() for name, run in of.items()]
    for run in (reference, workload.ours, *(run for *_, run in peers)):
        run(0)
    shares, own = [], []
    slower: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind, name, _ in peers}
    for i in range(rounds):
        start = 7 * i
        wait_until_quiet()
        before = seconds(reference, start)
        mine = seconds(workload.ours, start)
        for kind, name, run in peers:
            slower[kind, name].append(seconds(run, start) / mine)
        after = seconds(reference, start + 1)
        shares.append((before + after) / 2 / mine)
        own.append(mine)
    ratios = {"limit": Ratio.of(shares)}
    fastest = {}
    for kind, of in workload.peers.items():
        fastest[kind] = min(of, key=lambda name, kind=kind: statistics.median(slower[kind, name]))
        ratios[f"vs_{kind}"] = Ratio.of(slower[kind, fastest[kind]])
    typical = statistics.median(own)
    moved = workload.bytes_read + 2 * workload.bytes_updated
    return Result(
        workload.name, typical * 1e3, moved / typical / 1e9, ratios, fastest.get("strongest", "")
    )


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, tensor in a.items():
        if not torch.equal(tensor, b[name]):
            raise AssertionError(f"a second run gave other bits in {name}")


def show(console: Console, title: str, results: list[Result]) -> None:
    table = Table(title=title)
    for heading in ("workload", "ms", "GB/s", *HEADINGS.values(), "strongest"):
        table.add_column(
            heading, justify="left" if heading in ("workload", "strongest") else "right"
        )
    for result in results:
        cells = [_cell(result.ratios.get(column), column) for column in COLUMNS]
        table.add_row(
            result.name,
            f"{result.milliseconds:.2f}",
            f"{result.gigabytes_per_second:.1f}",
            *cells,
            result.strongest,
        )
    console.print(table)


def _cell(ratio: Ratio | None, column: str) -> str:
    if ratio is None:
        return "–"
    if column == "limit":
        return f"{ratio.median:.0%} ({ratio.low:.0%} … {ratio.high:.0%})"
    return f"{ratio.median:.1f} ({ratio.low:.1f} … {ratio.high:.1f})"


def summary(results: list[Result]) -> str:
    """The line that a benchmark ends with."""
    return json.dumps(
        {
            result.name: {
                column: round(result.ratios[column].median, 3)
                for column in COLUMNS
                if column in result.ratios
            }
            for result in results
        }
    )


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.machine()


def machine() -> str:
    """Name of the results file: ``cpu-amd-epyc-2core``."""
    name = re.sub(r"\(.*?\)|@.*|\bCPU\b|\bProcessor\b", " ", processor())
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"cpu-{slug}-{torch.get_num_threads()}core"


def write_results(section: str, title: str, note: str, results: list[Result]) -> Path:
    """Puts one benchmark's results into the machine's file, and leaves the others' as they are."""
    data_file = RESULTS / f"{machine()}.json"
    data: dict[str, Any] = json.loads(data_file.read_text()) if data_file.exists() else {}
    data["machine"] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": _C.build_info()["cpu_capability"],
    }
    data.setdefault("sections", {})[section] = {
        "title": title,
        "note": note,
        "torch": torch.__version__,
        "compiler": _C.build_info()["compiler"],
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "results": [asdict(result) for result in results],
    }
    RESULTS.mkdir(exist_ok=True)
    data_file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    page = data_file.with_suffix(".md")
    page.write_text(_page(data))
    return page


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def _page(data: dict[str, Any]) -> str:
    about = data["machine"]
    lines = [
        "<!-- Generated by the benchmarks; run them again instead of editing. -->",
        f"# {about['processor']}, {about['threads']} threads, {about['cpu_capability']}",
        "",
        "Medians over rounds, with quartiles. “of limit”: the time in which memory moves the same",
        "bytes, over ours. “×”: how many times longer the peer takes; above 1 is better for us.",
    ]
    for section in data["sections"].values():
        lines += [
            "",
            f"## {section['title']}",
            "",
            f"torch {section['torch']}, {section['compiler']}, commit {section['commit']}, "
            f"{section['date']}. {section['note']}",
            "",
            f"| workload | ms | GB/s | {' | '.join(HEADINGS.values())} | strongest |",
            "|---|--:|--:|--:|--:|--:|--:|---|",
        ]
        for result in section["results"]:
            ratios = {name: Ratio(**value) for name, value in result["ratios"].items()}
            cells = [_cell(ratios.get(column), column) for column in COLUMNS]
            lines.append(
                f"| {result['name']} | {result['milliseconds']:.2f} | "
                f"{result['gigabytes_per_second']:.1f} | {' | '.join(cells)} | "
                f"{result['strongest']} |"
            )
    return "\n".join(lines) + "\n"
