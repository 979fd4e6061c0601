"""How the benchmarks report: a table, one line of JSON, and the machine's results file."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass
class Ratio:
    """Median over rounds, with the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Ratio:
        # Quartiles ask for two values.
        several = values if len(values) > 1 else values * 2
        low, middle, high = statistics.quantiles(several, n=4, method="inclusive")
        return cls(middle, low, high)


@dataclass
class Column:
    """A column of a table; those in the summary are the numbers that a benchmark is about."""

    key: str
    heading: str
    kind: Literal["number", "share", "times", "text"]
    in_summary: bool = False

    def cell(self, value: Any) -> str:
        if value is None:
            return "–"
        if self.kind == "text":
            return str(value)
        if self.kind == "number":
            return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
        ratio = value if isinstance(value, Ratio) else Ratio(**value)
        parts = (ratio.median, ratio.low, ratio.high)
        middle, low, high = (f"{p:.1%}" if self.kind == "share" else f"{p:.1f}" for p in parts)
        return f"{middle} ({low} … {high})"


@dataclass
class Result:
    """One workload: its name, and a value for each column that applies to it."""

    name: str
    values: dict[str, Any]


@dataclass
class Target:
    """A results file: its name, and what its page begins with."""

    file: str
    heading: str
    note: str
    compiler: str
    about: dict[str, Any]

    @classmethod
    def this_machine(cls) -> Target:
        note = (
            "Medians over rounds, with quartiles. “×”: how many times longer the peer takes; above "
            "1\nis better for us."
        )
        # Not at the top: a build that failed is reported as well.
        try:
            from neusemslice import _C
        except ImportError:
            build = {"compiler": "not built", "cpu_capability": "not built"}
        else:
            build = _C.build_info()
        compiler = build["compiler"]
        if torch.cuda.is_available():
            about = gpu()
            heading = "{gpu}, {memory}, driver {driver}, CUDA {cuda}".format(**about)
            return cls(slug(about["gpu"]), heading, note, compiler, about)
        about = {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "cpu_capability": build["cpu_capability"],
        }
        return cls(
            machine(),
            "{processor}, {threads} threads, {cpu_capability}".format(**about),
            note,
            compiler,
            about,
        )


@dataclass
class Section:
    """What one benchmark found."""

    key: str
    title: str
    note: str
    columns: tuple[Column, ...]
    results: list[Result]

    def show(self, console: Console) -> None:
        table = Table(title=self.title)
        table.add_column("workload")
        columns = [c for c in self.columns if any(c.key in r.values for r in self.results)]
        for column in columns:
            table.add_column(column.heading, justify="left" if column.kind == "text" else "right")
        for result in self.results:
            cells = (column.cell(result.values.get(column.key)) for column in columns)
            table.add_row(result.name, *cells)
        console.print(table)

    def summary(self) -> str:
        """The line that a benchmark ends with."""
        keys = [column.key for column in self.columns if column.in_summary]
        return json.dumps(
            {
                result.name: {
                    key: round(getattr(result.values[key], "median", result.values[key]), 3)
                    for key in keys
                    if key in result.values
                }
                for result in self.results
            }
        )

    def write(self, target: Target | None = None) -> Path:
        """Puts the section into a results file, by default the machine's, beside the others."""
        target = target or Target.this_machine()
        data_file = RESULTS / f"{target.file}.json"
        data: dict[str, Any] = json.loads(data_file.read_text()) if data_file.exists() else {}
        data["machine"] = target.about
        data.setdefault("sections", {})[self.key] = asdict(self) | {
            "torch": torch.__version__,
            "compiler": target.compiler,
            "commit": _commit(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        data_file.parent.mkdir(parents=True, exist_ok=True)
        data_file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        page = data_file.with_suffix(".md")
        page.write_text(_page(target, data["sections"]))
        return page


def missing(*packages: str) -> str:
    """Which of the packages are not installed, as a sentence; empty if all are."""
    absent = [name for name in packages if not _is_there(name)]
    return f"no {' and no '.join(absent)} installed" if absent else ""


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.machine()


def machine() -> str:
    """Name of the results file: ``cpu-amd-epyc-2core``."""
    name = re.sub(r"\(.*?\)|@.*|\bCPU\b|\bProcessor\b", " ", processor())
    return f"cpu-{slug(name)}-{torch.get_num_threads()}core"


def slug(name: str) -> str:
    """As part of a file's name: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gpu() -> dict[str, Any]:
    """The current GPU and its software."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "multiprocessors": properties.multi_processor_count,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def driver() -> str:
    """Version of the GPU's driver."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return "of unknown version"
    return found.stdout.splitlines()[0].strip()


def _commit(folder: Path = Path(__file__).parent) -> str:
    """What was measured; results that were just written make no difference."""
    if named := os.environ.get("NSS_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        return found.stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    others = (":(top)", ":(top,exclude)bench/results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *others)
    return (head or "unknown") + "-dirty" * bool(changed)


def _page(target: Target, sections: dict[str, Any]) -> str:
    lines = [
        "<!-- Generated by the benchmarks; run them again instead of editing. -->",
        f"# {target.heading}",
        "",
        target.note,
    ]
    for section in sections.values():
        columns = [Column(**column) for column in section["columns"]]
        align = ["---" if column.kind == "text" else "--:" for column in columns]
        lines += [
            "",
            f"## {section['title']}",
            "",
            f"torch {section['torch']}, {section['compiler']}, commit {section['commit']}, "
            f"{section['date']}. {section['note']}",
            "",
            f"| workload | {' | '.join(column.heading for column in columns)} |",
            f"|---|{'|'.join(align)}|",
        ]
        for result in section["results"]:
            cells = [column.cell(result["values"].get(column.key)) for column in columns]
            lines.append(f"| {result['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
