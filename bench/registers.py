"""Registers, spills and shared memory of every CUDA kernel, as the compiler reports them.

python -m bench.registers [build/cmake]     after: cmake --build build/cmake --target cuda_check
python -m bench.registers build.log         after: NVCC_APPEND_FLAGS=-Xptxas=-v python setup.py …

Reads what ``nvcc -Xptxas -v`` said of each source and writes bench/results/ptxas-sm_90.md and
.json, or of a build's log the GPU's own; fails if a kernel spills. The last line is one JSON
object: kernels, and the most registers and bytes of spills that one of them has.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.device import ON_GPU, architecture
from bench.report import Column, Result, Section, Target

ARCHITECTURE = "sm_90"
COLUMNS = (
    Column("registers", "registers", "number"),
    Column("spills", "spilled bytes", "number"),
    Column("stack", "stack bytes", "number"),
    Column("shared", "shared bytes", "number"),
)
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_SOURCE = re.compile(r" -c +(?:-c +)?\S*?(\w+)\.cu\b")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass
class Usage:
    """What one kernel takes on one architecture; sizes in bytes."""

    name: str
    registers: int
    spills: int
    stack: int
    shared: int


def usages(log: str, architecture: str) -> list[Usage]:
    """The kernels that a log of ``ptxas -v`` lists for an architecture, under their mangled names.

    Raises:
        ValueError: if the log says of a kernel less than is asked.
    """
    found = []
    entries = list(_ENTRY.finditer(log))
    for entry, following in itertools.zip_longest(entries, entries[1:]):
        if entry[2] != architecture:
            continue
        text = log[entry.end() : following.start() if following else len(log)]
        stack, used = _STACK.search(text), _USED.search(text)
        if not stack or not used:
            raise ValueError(f"registers: the log does not say what {entry[1]} uses")
        spills = int(stack[2]) + int(stack[3])
        found.append(Usage(entry[1], int(used[1]), spills, int(stack[1]), int(used[2] or 0)))
    return found


def by_source(log: str) -> dict[str, str]:
    """A build's log, in which a command comes before its output, by the name of the source."""
    found: dict[str, str] = {}
    commands = list(_SOURCE.finditer(log))
    for command, following in zip(commands, [*commands[1:], None], strict=True):
        text = log[command.end() : following.start() if following else len(log)]
        if _ENTRY.search(text):
            found[command[1]] = text
    return found


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces and parameters; as they are, where there is no c++filt."""
    tool = shutil.which("c++filt")
    if not tool or not names:
        return names
    out = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [_short(name) for name in out]


def _short(name: str) -> str:
    plain = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name).removeprefix("void ")
    return re.sub(r"\(.*", "", plain)


def section(logs: dict[str, str], architecture: str) -> Section:
    """One row for each kernel; ``logs`` by the name of the source."""
    results = []
    for source, log in logs.items():
        found = usages(log, architecture)
        for usage, name in zip(found, readable([u.name for u in found]), strict=True):
            values = {
                "registers": usage.registers,
                "spills": usage.spills,
                "stack": usage.stack,
                "shared": usage.shared,
            }
            results.append(Result(f"{source}: {name}", values))
    results.sort(key=lambda result: result.name)
    note = "A thread's registers and a block's static shared memory."
    return Section("ptxas", f"Kernels on {architecture}", note, COLUMNS, results)


def _compiler() -> str:
    out = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", out)
    return f"nvcc {found[1] if found else 'of unknown version'}"


def main(arguments: list[str]) -> int:
    path = Path(arguments[0] if arguments else "build/cmake")
    target = None
    if path.is_file():
        logs, compiled_for = by_source(path.read_text()), architecture() if ON_GPU else ARCHITECTURE
    else:
        logs = {log.stem: log.read_text() for log in sorted(path.glob("cuda_check/*.ptxas"))}
        compiled_for, compiler = ARCHITECTURE, _compiler()
        about = {"architecture": ARCHITECTURE, "compiler": compiler}
        heading, note = (
            f"{compiler} for {ARCHITECTURE}",
            "What the compiler reports of each kernel.",
        )
        target = Target(f"ptxas-{ARCHITECTURE}", heading, note, compiler, about)
    found = section(logs, compiled_for)
    if not found.results:
        print(
            f"registers: {path} says nothing of kernels for {compiled_for}; build the target "
            "cuda_check first, or the extension with NVCC_APPEND_FLAGS=-Xptxas=-v"
        )
        return 1
    found.show(Console())
    print(f"written to {found.write(target)}")
    most = {key: max(r.values[key] for r in found.results) for key in ("registers", "spills")}
    print(json.dumps({"kernels": len(found.results), **most}))
    return 1 if most["spills"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
