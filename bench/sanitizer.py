"""Every operator under NVIDIA's compute-sanitizer.

python -m bench.sanitizer memcheck racecheck        writes bench/results/

Fails if a tool finds something in a kernel of this package; what it finds in others is counted
beside it. The last line is one JSON object: errors by tool.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.report import Column, Result, Section

TOOLS = ("memcheck", "racecheck", "synccheck")
COLUMNS = (
    Column("ours", "in our kernels", "number"),
    Column("others", "elsewhere", "number"),
    Column("first", "the first", "text"),
)
NOTE = "compute-sanitizer over `python -m bench.each_op`, each allocation its own."
LOGS = Path(__file__).parents[1] / "build" / "gpu"
_PREFIX = "========="
_SUMMARY = re.compile(r"(ERROR|RACECHECK|SYNCCHECK) SUMMARY: (\d+)")


@dataclass
class Findings:
    """Of one tool: how many reports name a kernel of this package, how many do not, the first."""

    ours: int = 0
    others: int = 0
    first: str = ""


def findings(log: str) -> Findings:
    """What a tool has reported.

    Raises:
        ValueError: with the tool's last words, if it did not come to its summary.
    """
    # The program's own output lies in between; a report begins where a line is not indented.
    lines = [line.removeprefix(_PREFIX) for line in log.splitlines() if line.startswith(_PREFIX)]
    if not any(_SUMMARY.search(line) for line in lines):
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        raise ValueError(f"it did not come to its end: {last}")
    reports: list[list[str]] = []
    for line in lines:
        text = line[1:]
        if not text.strip() or text.startswith(("COMPUTE-SANITIZER", "Target application")):
            continue
        if _SUMMARY.search(text):
            continue
        if text.startswith(" ") and reports:
            reports[-1].append(text)
        elif not text.startswith(" "):
            reports.append([text])
    found = Findings()
    for report in reports:
        if any("neusemslice" in line for line in report):
            found.ours += 1
            found.first = found.first or " ".join(" ".join(report[:2]).split())
        else:
            found.others += 1
    return found


def run(tool: str, executable: str) -> Findings:
    """Runs all operators under a tool.

    Raises:
        ValueError: see ``findings``.
    """
    made = subprocess.run(
        [executable, "--tool", tool, sys.executable, "-m", "bench.each_op"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / f"{tool}.log").write_text(made.stdout)
    return findings(made.stdout)


def main(arguments: list[str]) -> int:
    if not arguments or not set(arguments) <= set(TOOLS):
        print(f"sanitizer: name some of {', '.join(TOOLS)}, got {arguments}")
        return 2
    executable = find()
    if executable is None:
        print("sanitizer: there is no compute-sanitizer")
        return 2
    found = {}
    for tool in arguments:
        try:
            found[tool] = run(tool, executable)
        except ValueError as error:
            print(f"sanitizer: {tool}: {error}")
            return 1
        values = {"ours": found[tool].ours, "others": found[tool].others}
        if found[tool].first:
            values["first"] = found[tool].first
        section = Section(tool, f"compute-sanitizer {tool}", NOTE, COLUMNS, [Result(tool, values)])
        section.show(Console(width=160))
        section.write()
    print(json.dumps({tool: of.ours for tool, of in found.items()}))
    return 1 if any(of.ours for of in found.values()) else 0


def find() -> str | None:
    """The tool's path, also where only the toolkit's folder has it."""
    beside = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc")] if nvcc]
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", *map(str, beside)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
