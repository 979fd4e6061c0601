"""One command for a machine with a GPU: builds, tests, checks, measures, and writes the results.

python -m bench.gpu [--commit NAME]        NAME where the tree was copied without git

Builds the extension for the GPU's architecture in this interpreter's environment, offline; runs the
operators' tests on the GPU, every operator under compute-sanitizer, and the benchmarks; writes
bench/results/<gpu>.md and .json after each stage, and logs to build/gpu/. It ends within nine
minutes: each stage has a limit, and what fails, overruns or lacks a package is recorded with its
reason while the rest goes on. Ends with 1 if a stage failed or overran, and with 2 without a GPU.
The last line is one JSON object: each stage's status.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.report import Column, Result, Section, missing
from bench.sanitizer import find as compute_sanitizer
from bench.stages import Outcome, Stage, run

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "gpu"
BUDGET = 530.0
"""Seconds in all; with the interpreter's start and the last write less than nine minutes."""
COLUMNS = (
    Column("status", "ended", "text"),
    Column("seconds", "seconds", "number"),
    Column("says", "what it said last", "text"),
)
TESTS = (
    "tests/ops",
    "tests/test_optim.py",
    "tests/test_optim_contract.py",
    "tests/test_optim_state.py",
)


def stages() -> list[Stage]:
    """What is run, the most important first, as long as time is left."""
    python = sys.executable
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    beside = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])

    def benchmark(name: str, limit: float, *needs: str) -> Stage:
        absent = missing(*needs)
        if importlib.util.find_spec(f"bench.{name}") is None:
            absent = f"there is no bench.{name}"
        return Stage(name, (python, "-m", f"bench.{name}"), limit, absent, {"PATH": beside})

    build = Stage(
        "build",
        (python, "setup.py", "build_ext", "--inplace"),
        200,
        "" if shutil.which("nvcc") or os.environ.get("CUDA_HOME") else "there is no nvcc",
        {
            "PATH": beside,
            "NSS_FORCE_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
            "NVCC_APPEND_FLAGS": "-Xptxas=-v",
        },
        needed=True,
    )
    parallel = () if missing("xdist") else ("-n", "8")
    tests = Stage(
        "tests",
        (
            *(python, "-m", "pytest", "-q", "-k", "cuda", "-p", "no:cacheprovider", "--tb=short"),
            *(*parallel, *(path for path in TESTS if (ROOT / path).exists())),
        ),
        110,
        missing("pytest", "hypothesis"),
        {"PATH": beside, "OMP_NUM_THREADS": "1"},
    )
    sanitizer = "" if compute_sanitizer() else "there is no compute-sanitizer"

    def sanitized(tool: str, limit: float) -> Stage:
        command = (python, "-m", "bench.sanitizer", tool)
        return Stage(tool, command, limit, sanitizer, {"PATH": beside})

    return [
        build,
        Stage("registers", (python, "-m", "bench.registers", str(LOGS / "build.log")), 20),
        benchmark("limits", 30),
        tests,
        sanitized("memcheck", 60),
        sanitized("racecheck", 60),
        benchmark("class_stats", 75),
        benchmark("masked_optim", 45),
        benchmark("similarity", 110),
        benchmark("contribution", 30),
        benchmark("profiler", 45),
        benchmark("gram", 30),
        benchmark("rows", 30),
        sanitized("synccheck", 45),
    ]


def section(outcomes: Sequence[Outcome]) -> Section:
    results = [
        Result(o.name, {"status": o.status, "seconds": o.seconds, "says": _plain(o.says)})
        for o in outcomes
    ]
    note = "One run of `python -m bench.gpu`."
    return Section("run", "Stages", note, COLUMNS, results)


def _plain(text: str, most: int = 160) -> str:
    """As a cell of a table."""
    text = text.replace("|", "/")
    return text if len(text) <= most else text[: most - 1] + "…"


def tell(outcomes: Sequence[Outcome]) -> None:
    last = outcomes[-1]
    print(f"{last.name}: {last.status} after {last.seconds:.0f} s: {last.says}", flush=True)
    section(outcomes).write()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", help="what the results name as the commit")
    commit = parser.parse_args(arguments).commit
    if not torch.cuda.is_available():
        print("gpu: no CUDA device is visible, so nothing was built or run")
        return 2
    if commit:
        os.environ["NSS_COMMIT"] = commit
    os.chdir(ROOT)
    outcomes = run(stages(), BUDGET, LOGS, tell)
    print(json.dumps({outcome.name: outcome.status for outcome in outcomes}))
    return 1 if any(outcome.status in ("failed", "overran") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
