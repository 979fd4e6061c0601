"""How far LAMP, Global, Uniform+ and ERK compress a model, with and without slicing first.

python -m bench.compression            everything, writes bench/results/compression.{md,json}; hours
python -m bench.compression --quick    MNIST, two methods, few steps, nothing written

Each iteration removes a fifth of the parameters that are left (of neurons, or of single weights)
and fine-tunes for the same number of steps, with the whole model as teacher; the last model within
the accuracy budget counts. The networks have seen all training images, so the budget counts on a
random half of the test images, and the table's accuracy is of the other half, looked at once, after
the last step.

With slicing first, the model is restructured and compensated, without labels and training, so that
this is no iteration. The smallest model goes on, in steps of a tenth of the parameters, that has
spent no more than half of the budget: what follows needs the rest.

``bench/runs.py`` says how an interrupted study goes on.
The last line is one JSON object: per workload, with slicing first, `vs_without`, how many times
higher its compression rate is than without, and `saved`, how many iterations fewer it takes to the
lower of both rates.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

import neusemslice as nss
from bench import cifar, mnist
from bench.report import Column, Result, Section, Target
from bench.runs import RUNS, Runs
from bench.stream import Stream, random_parts
from neusemslice.maintain import compress, parameter_count, score
from neusemslice.maintain.sparsity import METHODS

KEPT = RUNS / "compression.json"
First = Literal["nothing", "slicing", "layers"]
"""What is done to a model before it is compressed; bench/study/rq2.py removes layers."""
FIRSTS: tuple[First, ...] = ("nothing", "slicing")
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
STEP = 0.2
RATE = 1e-3
SPENT = 0.5
"""Share of the budget that slicing may spend."""
ALIKE = 0.99
"""Share of a rate at which it counts as reached: removing a fifth each time does not hit it."""

COLUMNS = (
    Column("rate", "compression ×", "number", in_summary=True),
    Column("iterations", "iterations", "number", in_summary=True),
    Column("accuracy", "test accuracy %", "number", in_summary=True),
    Column("lost", "lost, points", "number"),
    Column("vs_without", "rate, without ×", "number", in_summary=True),
    Column("saved", "iterations fewer", "number", in_summary=True),
    Column("begun", "parameters left by slicing %", "number"),
)

Batches = list[tuple[Tensor, Tensor]]


class Shuffled:
    """A given number of random batches in each pass."""

    def __init__(self, x: Tensor, y: Tensor, size: int, batches: int) -> None:
        self.x, self.y, self.size, self.batches = x, y, size, batches
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.batches):
            part = torch.randint(len(self.y), (self.size,), generator=self.generator)
            yield self.x[part], self.y[part]


@dataclass(frozen=True)
class Subject:
    """A model, its images, and what a run of it may take.

    Attributes:
        training: makes a loader of so many fine-tuning batches, the same each time.
        calibration: batches of training images.
        validation, test: batches of the two halves of the test images.
        budget: accuracy that may be lost.
    """

    name: str
    model: nn.Module
    training: Callable[[int], Iterable[Any]]
    calibration: Batches
    validation: Batches
    test: Batches
    budget: float


def mnist_subject() -> Subject:
    data = mnist.load()
    x, y = data.train_images, data.train_labels
    return Subject(
        "LeNet-5, MNIST",
        mnist.trained(),
        lambda steps: Shuffled(x, y, 64, steps),
        _batches(x[:2_000], y[:2_000]),
        *(
            _batches(data.test_images[half], data.test_labels[half])
            for half in random_parts(len(data.test_labels), 0.5)
        ),
        budget=0.01,
    )


def cifar_subject() -> Subject:
    images, test = cifar.load("train"), cifar.load("test")
    return Subject(
        "ResNet-20, CIFAR-10",
        cifar.trained("resnet20_cifar10_jpeg").to(memory_format=torch.channels_last),
        lambda steps: Stream(images, 128, steps, 0),
        images[:2_000].batches(50),
        *(test[half].batches(50) for half in random_parts(len(test), 0.5)),
        budget=0.03,
    )


def _batches(x: Tensor, y: Tensor) -> Batches:
    return list(zip(x.split(100), y.split(100), strict=True))


class Remembering(nn.Module):
    """Answers as a model does, and batches that it has met from memory: all runs of a study
    fine-tune with the same ones, and a third of a step is the teacher's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.answers: dict[bytes, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = hashlib.sha256(x.contiguous().numpy()).digest()
        if key not in self.answers:
            self.answers[key] = self.model(x)
        return self.answers[key]


class Study(Runs):
    """All runs of one number of fine-tuning steps."""

    def __init__(self, subject: Subject, steps: int, kept: Path | None) -> None:
        super().__init__(kept)
        self.subject, self.steps = subject, steps
        self.teacher = Remembering(subject.model)
        self.smaller: dict[float, nn.Module] = {}

    @cached_property
    def slicing(self) -> nss.SemanticSlicing:
        return nss.slice(nss.profile(self.subject.model, self.subject.calibration))

    @cached_property
    def whole(self) -> float:
        return score(self.subject.model, self.subject.validation, "whole").accuracy

    def restructured(self, share: float) -> nn.Module:
        """The compensated model with a share of the parameters."""
        own = self.subject
        if share not in self.smaller:
            self.smaller[share] = nss.restructure(
                own.model, self.slicing, calibration=own.calibration, params=share
            ).model
        return self.smaller[share]

    def untrained(self, share: float) -> float | None:
        """Its accuracy on validation images; None if it cannot be made that small."""
        try:
            model = self.restructured(share)
        except ValueError:
            return None
        return score(model, self.subject.validation, "sliced").accuracy

    @cached_property
    def sliced(self) -> nn.Module:
        """The smallest model that has spent no more than its share of the budget; found by
        bisection, as a smaller one has spent more."""
        least = self.whole - SPENT * self.subject.budget

        def too_small(share: float) -> bool:
            key = f"{self.subject.name}, {share:g} of the parameters, untrained"
            found = self.once(key, partial(self.untrained, share))
            return found is None or found < least

        allowed = bisect_left(SHARES, True, key=too_small)
        return self.restructured(SHARES[allowed - 1]) if allowed else self.subject.model

    def begin(self, first: First) -> tuple[nn.Module, int]:
        """The model that compression goes on from, and the iterations that it took."""
        return (self.sliced if first == "slicing" else self.subject.model), 0

    def run(self, method: Any, granularity: Any, first: First) -> dict[str, Any]:
        """What a run ends with, and the rates after each iteration."""
        own = self.subject
        begin, before = self.begin(first)
        found = compress(
            begin,
            own.training(self.steps),
            own.validation,
            method=method,
            granularity=granularity,
            step=STEP,
            budget=own.budget,
            accuracy=self.whole,
            lr=RATE,
            teacher=self.teacher,
        )
        total, left = parameter_count(own.model), found.report.parameters
        rates = [total / parameters for parameters in left[: found.report.iterations + 1]]
        return {
            "rate": rates[-1],
            "rates": [1.0] * before + rates,
            "iterations": before + found.report.iterations,
            "accuracy": 100 * score(found.model, own.test, "test").accuracy,
            "begun": None if first == "nothing" else 100 * left[0] / total,
        }


def study(
    subject: Subject, steps: int, methods: tuple[Any, ...], kept: Path | None
) -> list[Result]:
    runs = Study(subject, steps, kept)
    whole = runs.once(
        f"{subject.name}, whole", lambda: 100 * score(subject.model, subject.test, "test").accuracy
    )
    results = [Result(f"{subject.name}: whole", {"accuracy": whole})]
    for granularity, method in itertools.product(("neuron", "weight"), methods):
        found = {
            first: runs.once(
                f"{subject.name}, {granularity}, {method}, first {first}, {steps} steps",
                partial(runs.run, method, granularity, first),
            )
            for first in FIRSTS
        }
        without, sliced = found["nothing"], found["slicing"]
        both = min(without["rate"], sliced["rate"])
        until, sooner = (
            next(i for i, rate in enumerate(run["rates"]) if rate >= ALIKE * both)
            for run in (without, sliced)
        )
        for first, values in found.items():
            shown = {**values, "lost": whole - values["accuracy"]}
            if first == "slicing":
                shown["vs_without"] = sliced["rate"] / without["rate"]
                shown["saved"] = until - sooner
            name = f"{subject.name}: {granularity}s, {method}"
            if first == "slicing":
                name += ", slicing first"
            results.append(Result(name, {k: v for k, v in shown.items() if v is not None}))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model, two methods, few steps")
    quick = parser.parse_args().quick
    if reason := mnist.missing():
        raise SystemExit(f"bench.compression: {reason}")
    makes = [mnist_subject]
    if not quick and cifar.missing() is None:
        makes.append(cifar_subject)
    steps = 10 if quick else 100
    results = [
        result
        for make in makes
        for result in study(
            make(), steps, METHODS[:2] if quick else METHODS, None if quick else KEPT
        )
    ]
    note = (
        f"Each iteration removes {STEP:.0%} of the parameters that are left, then {steps} steps of "
        f"AdamW at {RATE:g}. Budgets: 1 point on MNIST, 3 on CIFAR-10. Slicing trains nothing "
        "and is no iteration. “Iterations fewer”: until the lower of both rates, or nearly (99 %)."
    )
    section = Section("compression", "Compression after slicing", note, COLUMNS, results)
    section.show(Console(width=140))
    if not quick:
        target = Target(
            "compression",
            "Compression with and without slicing first",
            "Rates are the whole model's parameters over those that are left.",
            Target.this_machine().compiler,
            Target.this_machine().about,
        )
        print(f"wrote {section.write(target)}")
    print(section.summary())


if __name__ == "__main__":
    main()
