"""Commands one after the other, each with a limit of its own and all with one together.

What fails or overruns is recorded with its reason, and the rest goes on. Each command is a process
of its own, so that a kernel that breaks the device, or hangs, takes nothing else with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["done", "failed", "overran", "skipped"]
LEAST = 5.0
"""Seconds under which a stage is not begun."""


@dataclass(frozen=True)
class Stage:
    """A command.

    Attributes:
        name: of its log as well.
        command: the arguments, the program first.
        limit: seconds after which it is ended.
        skip: why it cannot run here; empty if it can.
        env: variables to add to the environment.
        needed: whether nothing after it makes sense without it.
    """

    name: str
    command: Sequence[str]
    limit: float
    skip: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    needed: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: its status, seconds, and the reason or the last line it printed."""

    name: str
    status: Status
    seconds: float
    says: str


@dataclass(frozen=True)
class Ended:
    """A process: its exit status, None if it was ended, and all that it printed."""

    status: int | None
    output: str


Execute = Callable[[Sequence[str], Mapping[str, str], float, Path], Ended]


def execute(command: Sequence[str], env: Mapping[str, str], limit: float, log: Path) -> Ended:
    """Runs a command with its output in a log; ends it and its children after `limit` seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # Also what a command that has ended may have left running.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(status, log.read_text(errors="replace"))


def run(
    stages: Sequence[Stage],
    budget: float,
    logs: Path,
    told: Callable[[Sequence[Outcome]], object],
    *,
    execute: Execute = execute,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Runs the stages within `budget` seconds, and tells of all outcomes so far after each."""
    end = clock() + budget
    outcomes: list[Outcome] = []
    missing = ""
    for stage in stages:
        outcome = _run(stage, end, logs, missing, execute, clock)
        if stage.needed and outcome.status != "done":
            missing = f"it needs what {stage.name} did not do"
        outcomes.append(outcome)
        told(outcomes)
    return outcomes


def _run(
    stage: Stage,
    end: float,
    logs: Path,
    missing: str,
    execute: Execute,
    clock: Callable[[], float],
) -> Outcome:
    begin = clock()
    limit = min(stage.limit, end - begin)
    if reason := stage.skip or missing or (limit < LEAST and "no time was left"):
        return Outcome(stage.name, "skipped", 0.0, reason)
    ended = execute(stage.command, stage.env, limit, logs / f"{stage.name}.log")
    took = clock() - begin
    lines = [line.strip() for line in ended.output.splitlines() if line.strip()]
    last = lines[-1] if lines else "it printed nothing"
    if ended.status is None:
        return Outcome(stage.name, "overran", took, f"ended after {limit:.0f} s; last: {last}")
    if ended.status:
        return Outcome(stage.name, "failed", took, f"exit status {ended.status}: {last}")
    return Outcome(stage.name, "done", took, last)
