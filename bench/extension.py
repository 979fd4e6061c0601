"""New classes after old ones: what is learned, and what is forgotten.

python -m bench.extension            everything, writes bench/results/extension.{md,json}; hours
python -m bench.extension --quick    MNIST, few images, one seed, nothing written; under a minute

ResNet-20 on CIFAR-10 as JPEGs and LeNet-5 on MNIST learn five classes, then the other five; and
five tasks of two classes each. The network after the first task is the same for all methods. All
see the same images in batches of 128 (AdamW, learning rate falling linearly to 0) and take the same
steps on new classes; ours and PackNet also take the same steps on old ones before. ResNet-20 is
trained in mixed precision (bfloat16) by all, and answers in float32. Each method chooses among the
same number of settings (learning rates; a penalty's strength; how the network is divided) by short
runs from the first seed's network, on training images that no run trains on, by the mean accuracy
of all tasks. Test images are looked at after the last step.

Problem by problem, a seed is finished for all methods before the next one begins; results are
written after each, and ``bench/runs.py`` says how an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from bench import cifar, mnist
from bench.continual.deeparc import DeepArc
from bench.continual.ewc import EWC
from bench.continual.learner import HeadOnly, Naive, Setting
from bench.continual.lwf import LwF
from bench.continual.ours import Ours, OursReplay10
from bench.continual.packnet import PackNet, PackNetNorms
from bench.continual.problem import (
    Problem,
    cifar_problem,
    halves,
    local,
    mnist_problem,
    pairs,
)
from bench.continual.replay import Replay5, Replay10, Replay100
from bench.report import Column, Result, Section, Target
from bench.runs import RUNS, Runs
from neusemslice.maintain.continual import average_accuracy, backward_transfer, forgetting

KEPT = RUNS / "extension.json"
SEARCH_STEPS = 60
SEEDS = (0, 1, 2)

METHODS: dict[str, type[Naive]] = {
    "ours": Ours,
    "ours, replay 10 %": OursReplay10,
    "naive": Naive,
    "new head only": HeadOnly,
    "replay 5 %": Replay5,
    "replay 10 %": Replay10,
    "replay 100 %": Replay100,
    "redundant layers (DeepArc)": DeepArc,
    "PackNet": PackNet,
    "PackNet, norms per task": PackNetNorms,
    "EWC": EWC,
    "LwF": LwF,
}
IN_A_ROW = ("ours", "naive", "PackNet", "PackNet, norms per task")
"""What learns five tasks."""
SETTING_OF = {"ours, replay 10 %": "ours"}
"""What does not choose a setting of its own."""
NO_RIVAL = ("ours", "ours, replay 10 %", "replay 100 %")

COLUMNS = (
    Column("seeds", "seeds", "number"),
    Column("old", "old classes %", "number", in_summary=True),
    Column("new", "new classes %", "number", in_summary=True),
    Column("acc", "ACC %", "number", in_summary=True),
    Column("std", "± std", "number"),
    Column("vs_rivals", "− best rival, points", "number", in_summary=True),
    Column("together", "class-incremental %", "number", in_summary=True),
    Column("bwt", "BWT, points", "number"),
    Column("forgetting", "forgetting, points", "number", in_summary=True),
    Column("unchanged", "answers unchanged %", "number", in_summary=True),
    Column("setting", "learning rate", "text"),
    Column("minutes", "minutes", "number"),
)
NOTE = (
    "Test accuracy within a task (task-incremental), mean over seeds; ACC: the mean over tasks "
    "after the last one, with its standard deviation over seeds. “Best rival”: of all methods but "
    "replay 100 %, which has all old images. “Class-incremental”: among all classes. "
    "“Forgetting”: how far accuracy on earlier tasks is below that right after each was learned. "
    "“Answers unchanged”: share of test images whose logits for every earlier task have the bits "
    "that they had when the next task's training began."
)


def measured(
    problem: Problem, base: nn.Module, method: type[Naive], setting: Setting, seed: int
) -> dict[str, Any]:
    """What a method makes of a problem."""
    begin = time.perf_counter()
    learner = method(problem, base, setting, seed)
    matrix = [[accuracy(learner, 0)]]
    unchanged = []
    for number in range(1, len(problem.tasks)):
        teach(learner, number)
        matrix.append(accuracies(learner))
        for task, before in enumerate(learner.before):
            unchanged.append(same_bits(before, learner.answers(problem.data.test, task)))
    return {
        "matrix": matrix,
        "together": together(learner, problem),
        "unchanged": 100 * min(unchanged),
        "minutes": (time.perf_counter() - begin) / 60,
    }


def teach(learner: Naive, number: int) -> None:
    """The task of a number, after those before it."""
    problem, seed = learner.problem, learner.seed
    old, classes = problem.tasks[number - 1 : number + 1]
    learner.prepare(problem.stream(problem.data.train.of(old), seed + 1))
    learner.learn(classes, problem.stream(problem.data.train.of(classes), seed + 2))


def accuracies(learner: Naive) -> list[float]:
    """Of each task so far."""
    return [accuracy(learner, task) for task in range(len(learner.classes))]


def accuracy(learner: Naive, task: int) -> float:
    """Of a task's test images, among its classes, in percent."""
    classes = learner.problem.tasks[task]
    images = learner.problem.data.test.of(classes)
    return percent(learner.answers(images, task).argmax(1) == local(images.labels, classes))


def together(learner: Naive, problem: Problem) -> float:
    """Accuracy among all classes, in percent."""
    images = problem.data.test
    return percent(learner.scores(images).argmax(1) == local(images.labels, problem.classes))


def percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def same_bits(before: Tensor, after: Tensor) -> float:
    """Share of rows without a difference; a NaN counts as one."""
    return float((before == after).all(1).double().mean())


class Study:
    """Runs what is not kept yet of a problem.

    Args:
        steps: of a pass in the short runs with which settings are chosen.
    """

    def __init__(self, problem: Problem, kept: Runs, steps: int) -> None:
        self.problem, self.kept, self.steps = problem, kept, steps

    def chosen(self, name: str) -> Setting:
        """The setting that is best on validation images after few steps."""
        found = {}
        name = SETTING_OF.get(name, name)
        method, problem = METHODS[name], self.problem
        for setting in method.settings:
            run = partial(self.tried, method, setting)
            what = f"{problem.key}, {problem.settings}, {name}, {setting}"
            key = f"search {what}, {self.steps} steps"
            found[setting] = self.kept.once(key, run)
        return max(found, key=lambda setting: found[setting])

    def tried(self, method: type[Naive], setting: Setting) -> float:
        problem = self.problem
        learner = method(problem.short(self.steps), problem.base(0), setting, 0)
        for number in range(1, len(problem.tasks)):
            teach(learner, number)
        return statistics.mean(accuracies(learner))

    def run(self, name: str, seed: int) -> dict[str, Any]:
        problem, setting = self.problem, self.chosen(name)
        key = f"{problem.key}, {problem.settings}, {name}, {setting}, seed {seed}"
        return self.kept.once(
            key, lambda: measured(problem, problem.base(seed), METHODS[name], setting, seed)
        )

    def results(self, seeds: tuple[int, ...]) -> list[Result]:
        """A row for each method."""
        problem = self.problem
        methods = applicable(METHODS if len(problem.tasks) == 2 else IN_A_ROW, problem)
        runs = {name: [self.run(name, seed) for seed in seeds] for name in methods}
        base = statistics.mean(run["matrix"][0][0] for run in runs["naive"])
        rows = [Result(f"{problem.key}: before", {"old": base})]
        matrices = {name: [square(run["matrix"]) for run in found] for name, found in runs.items()}
        accs = {name: list(map(average_accuracy, found)) for name, found in matrices.items()}
        best = max(statistics.mean(accs[name]) for name in runs if name not in NO_RIVAL)
        for name, found in runs.items():
            values = {
                "seeds": len(seeds),
                "old": statistics.mean(run["matrix"][-1][0] for run in found),
                "new": statistics.mean(statistics.mean(run["matrix"][-1][1:]) for run in found),
                "acc": 100 * statistics.mean(accs[name]),
                "std": 100 * statistics.stdev(accs[name]) if len(seeds) > 1 else None,
                "together": statistics.mean(run["together"] for run in found),
                "bwt": 100 * statistics.mean(map(backward_transfer, matrices[name])),
                "forgetting": 100 * statistics.mean(map(forgetting, matrices[name])),
                "unchanged": min(run["unchanged"] for run in found),
                "setting": self.chosen(name).shown(len(problem.tasks)),
                "minutes": statistics.mean(run["minutes"] for run in found),
            }
            if name == "ours":
                values["vs_rivals"] = values["acc"] - 100 * best
            rows.append(Result(f"{problem.key}: {name}", values))
        return rows


def square(rows: list[list[float]]) -> Tensor:
    """Percentages after each task as a matrix of shares; what was not measured is NaN."""
    matrix = torch.full((len(rows), len(rows)), torch.nan, dtype=torch.float64)
    for row, values in zip(matrix, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.float64) / 100
    return matrix


def applicable(names: Iterable[str], problem: Problem) -> list[str]:
    """Methods that differ for the problem's network: one without norms has none per task."""
    norms = any(isinstance(m, nn.BatchNorm2d) for m in problem.network(2).modules())
    return [name for name in names if norms or METHODS[name] is not PackNetNorms]


def problems(quick: bool) -> list[Problem]:
    """Those of each data set that is here."""
    splits = (halves(10), pairs(10))
    found = []
    if mnist.missing() is None:
        found += [mnist_problem(split, quick) for split in splits]
    if not quick and cifar.missing() is None:
        found += [cifar_problem(split) for split in splits]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one data set, few images, one seed")
    quick = parser.parse_args().quick
    if not (given := problems(quick)):
        raise SystemExit(f"bench.extension: {mnist.missing()}; {cifar.missing()}")
    kept = Runs(None if quick else KEPT)
    target = Target(
        "extension",
        "Extension",
        "New classes after old ones. See bench/extension.py for the protocol.",
        "no compiler",
        {"torch": torch.__version__},
    )
    section = Section("extension", "New classes after old ones", NOTE, COLUMNS, [])
    finished: list[Result] = []
    for problem in given:
        study = Study(problem, kept, 2 if quick else SEARCH_STEPS)
        for last in range(1 if quick else len(SEEDS)):
            rows = study.results(SEEDS[: last + 1])
            section.results = finished + rows
            section.show(Console(width=200))
            if not quick:
                print(f"wrote {section.write(target)}")
        finished += rows
    print(section.summary())


if __name__ == "__main__":
    main()
