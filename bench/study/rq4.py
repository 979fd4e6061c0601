"""RQ4: old and new classes after extension, against retraining, replay and continual learning.

The protocol, the methods and their runs are those of ``bench/extension.py``: five classes, then the
other five.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench import cifar, extension, mnist
from bench.continual.problem import cifar_problem, digits_problem, halves, mnist_problem
from bench.report import Column, Result, Section
from bench.runs import Runs
from bench.study import figures
from bench.study.outcome import SPREAD, Outcome, spread

COLUMNS = (
    *SPREAD,
    Column("old", "A, old classes %", "number"),
    Column("old_std", "± std", "number"),
    Column("new", "B, new classes %", "number"),
    Column("new_std", "± std", "number"),
    Column("together", "among all classes %", "number"),
    Column("unchanged", "old answers unchanged %", "number"),
    Column("setting", "learning rate", "text"),
)
NOTE = (
    "Test accuracy within A and within B after B was learned; mean: of both. “Unchanged”: share of "
    "test images whose logits of A have the bits that they had before training on B. See "
    "bench/extension.py for the protocol."
)


def run(quick: bool, seeds: int) -> Outcome:
    """The table and the figure."""
    kept = Runs(None if quick else extension.KEPT)
    split = halves(10)
    if quick:
        problems = [digits_problem(split)]
    else:
        problems = [mnist_problem(split)] if mnist.missing() is None else []
        problems += [cifar_problem(split)] if cifar.missing() is None else []
    results: list[Result] = []
    panels: dict[str, Any] = {}
    for problem in problems:
        study = extension.Study(problem, kept, 2 if quick else extension.SEARCH_STEPS)
        methods = extension.applicable(extension.METHODS, problem)
        panel = panels.setdefault(problem.key, {})
        for name in methods:
            found = [study.run(name, seed) for seed in range(seeds)]
            old, new = ([run["matrix"][-1][task] for run in found] for task in (0, 1))
            panel[name] = {"A, old classes": old, "B, new classes": new}
            values: dict[str, Any] = spread([(a + b) / 2 for a, b in zip(old, new, strict=True)])
            for task, accuracies in (("old", old), ("new", new)):
                own = spread(accuracies)
                values |= {task: own["mean"], f"{task}_std": own["std"]}
            values["together"] = statistics.mean(run["together"] for run in found)
            values["unchanged"] = min(run["unchanged"] for run in found)
            values["setting"] = study.chosen(name).shown(len(split))
            results.append(Result(f"{problem.key}: {name}", values))
    return Outcome(
        "RQ4: new classes after old ones",
        [Section("rq4", "Five classes, then the other five", NOTE, COLUMNS, results)],
        lambda path: figures.bars(panels, "accuracy (%)", path),
    )
