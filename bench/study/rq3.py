"""RQ3: a network that meets other images, or was damaged, is tuned to answer them.

(a) JPEGs, for a network of the original images; (b) adversarial images; (c) noise, blur and low
contrast at five strengths; (d) a part of the weights drawn anew, until accuracy has fallen by 10,
30 and 50 points. Every method sees the same few new images in the same order for the same number of
steps (AdamW, batches of 128, learning rate falling linearly to 0). It chooses its learning rate,
and whether batch norms normalise by the batch and let their running statistics follow, by the same
runs of the first seed for each of the four families, on validation images.

A row's mean is the accuracy on new test images after tuning; of (b) and (c) the old ones are the
same images unchanged. A seed stands for a network (of (a) there is one), for new images and for
their order.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import neusemslice as nss
from bench import cifar
from bench.cifar import Images
from bench.datasets import Data, cifar10
from bench.mixed import mixed
from bench.report import Column, Result, Section
from bench.runs import RUNS, Runs
from bench.stream import Stream
from bench.study import figures, shifts
from bench.study.networks import DIGITS, NETWORKS, Network
from bench.study.outcome import SPREAD, Outcome, spread
from bench.tuning import BUDGET, DEEPARC, Choice, some, tune
from neusemslice.maintain import recalibrate
from neusemslice.maintain.drift import choose, component_drift, neuron_drift

METHODS = ("ours", "full", DEEPARC, "last layer", "LoRA")
JPEG, ADVERSARIAL, CORRUPTED, DAMAGED = "JPEG", "adversarial", "corrupted", "damaged"
PROFILE_BATCH = 250
TEST_BATCH = 50
"""Activations of so few images stay in the caches: a third faster than 250, with the same bits."""

COLUMNS = (
    *SPREAD,
    Column("before", "before %", "number"),
    Column("old", "old images %", "number"),
    Column("old_before", "before %", "number"),
    Column("parameters", "parameters tuned %", "number"),
    Column("seconds", "s", "number"),
    Column("state", "optimizer KiB", "number"),
    Column("setting", "chosen", "text"),
)


@dataclass(frozen=True)
class Case:
    """One network that has to be re-adapted.

    Attributes:
        model: before.
        slicing: of the network as it knows the old images.
        rows: the neurons that ours tunes; LoRA's rank is such that it trains as many parameters.
        train, validation, test: new images.
        old: test images that ``model`` knew; ``None`` if they are the new ones, or not at hand.
    """

    model: nn.Module
    slicing: nss.SemanticSlicing
    rows: nss.Slice
    data: Data
    train: Images
    validation: Images
    test: Images
    old: Images | None


@dataclass(frozen=True)
class Shift:
    """What happens, and how the table calls it."""

    family: str
    name: str
    strength: int = 0


SHIFTS = (
    Shift(JPEG, "JPEG"),
    Shift(ADVERSARIAL, "FGSM"),
    Shift(ADVERSARIAL, "PGD"),
    *(
        Shift(CORRUPTED, kind, strength)
        for kind in ("noise", "blur", "contrast")
        for strength in shifts.STRENGTHS
    ),
    *(Shift(DAMAGED, "weights drawn anew", fall) for fall in (10, 30, 50)),
)
CHOSEN_BY = {
    JPEG: SHIFTS[0],
    ADVERSARIAL: SHIFTS[2],
    CORRUPTED: Shift(CORRUPTED, "noise", 3),
    DAMAGED: Shift(DAMAGED, "weights drawn anew", 30),
}
"""With what a family's settings are chosen."""


@dataclass(frozen=True)
class Size:
    """How much of everything the study has."""

    network: Network
    shifts: tuple[Shift, ...]
    train: int
    validation: int
    test: int
    profiled: int
    steps: int
    search_steps: int
    rates: tuple[float, ...]
    batch: int = 128


FULL = Size(
    next(network for network in NETWORKS if network.name.startswith("ResNet-20")),
    SHIFTS,
    train=5_000,
    validation=2_000,
    test=5_000,
    profiled=2_000,
    steps=80,
    search_steps=40,
    rates=(3e-4, 1e-3, 3e-3, 1e-2),
)
QUICK = Size(
    DIGITS,
    (SHIFTS[1], Shift(CORRUPTED, "contrast", 5), Shift(DAMAGED, "weights drawn anew", 30)),
    train=500,
    validation=100,
    test=200,
    profiled=300,
    steps=10,
    search_steps=2,
    rates=(3e-3,),
    batch=32,
)


class Study(Runs):
    """All runs of one size."""

    def __init__(self, size: Size, kept: Path | None) -> None:
        super().__init__(kept)
        self.size = size
        self._case: tuple[tuple[Shift, int], Case] | None = None

    def case(self, shift: Shift, seed: int) -> Case:
        """The last one is kept: all methods follow each other."""
        if self._case is None or self._case[0] != (shift, seed):
            self._case = (shift, seed), self._made(shift, seed)
        return self._case[1]

    def _made(self, shift: Shift, seed: int) -> Case:
        size = self.size
        data = cifar10() if shift.family == JPEG else size.network.data()
        parts = (
            some(data.train, size.train, seed),
            data.validation[: size.validation],
            data.test[: size.test],
        )
        if shift.family == JPEG:
            model, known = (cifar.trained("resnet20_cifar10") for _ in range(2))
            # The original images are not at hand: the network with norms that fit the JPEGs is
            # what it would be if they met the statistics that it remembers.
            recalibrate(known, self.inputs(data, parts[0]))
            return self.profiled(model, known, data, parts[0], parts, None)
        known = size.network.trained(seed)
        if shift.family == DAMAGED:
            share = self.once(
                f"{size.network.name}, share for {shift.strength} points, seed {seed}",
                partial(self.share, known, data, shift.strength, seed),
            )
            broken = shifts.damaged(known, share, seed)
            return self.profiled(broken, known, data, parts[0], parts, None)
        train, validation, test = (self.changed(known, data, part, shift, seed) for part in parts)
        changed = (train, validation, test)
        return self.profiled(known, known, data, parts[0], changed, parts[2])

    def profiled(
        self,
        model: nn.Module,
        known: nn.Module,
        data: Data,
        old: Images,
        parts: tuple[Images, Images, Images],
        old_test: Images | None,
    ) -> Case:
        """A case with the old images' slicing of the network that knows them."""
        slicing = nss.slice(nss.profile(known, self.inputs(data, old)), threshold=0.95)
        new = nss.profile(model, self.inputs(data, parts[0]), ("avg",))
        moved = component_drift(slicing, neuron_drift(slicing, new))
        rows, _ = choose(slicing, moved, int(BUDGET * slicing.profile.graph.neurons))
        return Case(model, slicing, rows, data, *parts, old_test)

    def changed(
        self, model: nn.Module, data: Data, images: Images, shift: Shift, seed: int
    ) -> Images:
        """Images of one part, shifted."""
        ways: dict[str, Callable[[], Images]] = {
            "FGSM": lambda: shifts.fgsm(model, data, images),
            "PGD": lambda: shifts.pgd(model, data, images),
            "noise": lambda: shifts.noise(images, shift.strength, data.white, seed),
            "blur": lambda: shifts.blur(images, shift.strength, data.white),
            "contrast": lambda: shifts.contrast(images, shift.strength, data.white),
        }
        return ways[shift.name]()

    def share(self, model: nn.Module, data: Data, points: int, seed: int) -> float:
        """Of the weights to draw anew, by bisection on validation images."""
        images = data.validation[: self.size.validation]
        wanted = self.accuracy(model, data, images) - points
        low, high = 0.0, 0.5
        for _ in range(8):
            middle = (low + high) / 2
            broken = shifts.damaged(model, middle, seed)
            if self.accuracy(broken, data, images) > wanted:
                low = middle
            else:
                high = middle
        return high

    def inputs(self, data: Data, images: Images) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches to profile with, as many as the study profiles."""
        return data.batches(images[: self.size.profiled], PROFILE_BATCH)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, data: Data, images: Images) -> float:
        """In percent."""
        model.eval()
        right = [(model(x).argmax(1) == y).double() for x, y in data.batches(images, TEST_BATCH)]
        return 100 * float(torch.cat(right).mean())

    def tuned(
        self, method: str, shift: Shift, choice: Choice, steps: int, seed: int
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A tuned network, and what that took."""
        case = self.case(shift, seed)
        stream = Stream(case.train, self.size.batch, steps, seed, case.data.prepared)
        model = self.trainable(case.model)
        found = tune(method, model, case.slicing, case.rows, choice, stream)
        return found.model, {
            "seconds": found.seconds,
            "parameters": 100 * found.parameters / sum(p.numel() for p in case.model.parameters()),
            "state": found.state / 1024,
        }

    def trainable(self, model: nn.Module) -> nn.Module:
        """A copy that trains in mixed precision where its network does."""
        own = copy.deepcopy(model)
        return mixed(own) if self.size.network.mixed else own

    def chosen(self, method: str, family: str) -> Choice:
        """What is best on validation images after few steps."""
        shift, steps = CHOSEN_BY[family], self.size.search_steps

        def judged(choice: Choice) -> float:
            case = self.case(shift, 0)
            model, _ = self.tuned(method, shift, choice, steps, 0)
            return self.accuracy(model, case.data, case.validation)

        found = {}
        for rate, renewed in itertools.product(self.size.rates, (False, True)):
            choice = Choice(rate, renewed)
            key = f"search {self.size.network.name}, {family}, {method}, {choice}, {steps} steps"
            found[choice] = self.once(key, partial(judged, choice))
        return max(found, key=lambda choice: found[choice])

    def measured(self, method: str, shift: Shift, choice: Choice, seed: int) -> dict[str, Any]:
        case = self.case(shift, seed)
        model, values = self.tuned(method, shift, choice, self.size.steps, seed)
        return values | self.accuracies(model, case)

    def untuned(self, shift: Shift, seed: int) -> dict[str, Any]:
        case = self.case(shift, seed)
        return self.accuracies(case.model, case)

    def accuracies(self, model: nn.Module, case: Case) -> dict[str, float]:
        """On new test images, and on old ones where there are any."""
        parts = {"new": case.test, "old": case.old}
        return {
            name: self.accuracy(model, case.data, images)
            for name, images in parts.items()
            if images is not None
        }

    def results(self, seeds: range) -> dict[Shift, dict[str, list[dict[str, Any]]]]:
        """Runs by shift and method; before tuning as ``"untuned"``."""
        size = self.size
        choices = {
            (family, method): self.chosen(method, family)
            for family in dict.fromkeys(shift.family for shift in size.shifts)
            for method in METHODS
        }
        found: dict[Shift, dict[str, list[dict[str, Any]]]] = {}
        for seed, shift in itertools.product(seeds, size.shifts):
            runs = found.setdefault(shift, {})
            where = f"{size.network.name}, {shift}, {size.steps} steps, seed {seed}"
            key = f"{where}, untuned"
            runs.setdefault("untuned", []).append(
                self.once(key, partial(self.untuned, shift, seed))
            )
            for method in METHODS:
                choice = choices[shift.family, method]
                run = partial(self.measured, method, shift, choice, seed)
                kept = self.once(f"{where}, {method}, {choice}", run)
                runs.setdefault(method, []).append({**kept, "choice": choice})
        return found


def run(quick: bool, seeds: int) -> Outcome:
    """The table and the figure."""
    size = QUICK if quick else FULL
    if size.network.missing() is not None:
        return Outcome("", [], lambda path: None)
    study = Study(size, None if quick else RUNS / "study-rq3.json")
    found = study.results(range(seeds))
    results: list[Result] = []
    panels: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    for shift, methods in found.items():
        name = f"{shift.name} {shift.strength}" if shift.strength else shift.name
        untuned = methods["untuned"]
        for method in METHODS:
            runs = methods[method]
            values: dict[str, Any] = spread([run["new"] for run in runs])
            values["before"] = statistics.mean(run["new"] for run in untuned)
            if "old" in runs[0]:
                values["old"] = statistics.mean(run["old"] for run in runs)
                values["old_before"] = statistics.mean(run["old"] for run in untuned)
            for key in ("parameters", "seconds", "state"):
                values[key] = statistics.mean(run[key] for run in runs)
            choice = runs[0]["choice"]
            values["setting"] = f"{choice.rate:g}" + ", statistics follow" * choice.renewed
            results.append(Result(f"{shift.family}, {name}: {method}", values))
            bars = panels.setdefault(shift.family, {}).setdefault(method, {"new": [], "old": []})
            for kind, values_of in bars.items():
                if kind in runs[0]:
                    values_of.append([run[kind] for run in runs])
    # The mean over shifts, by seed.
    shown = {
        family: {
            method: {
                kind: np.mean(values, axis=0).tolist() for kind, values in bars.items() if values
            }
            for method, bars in methods.items()
        }
        for family, methods in panels.items()
    }
    note = (
        f"{size.network.name.partition(',')[0]}; {size.train:,} new images, {size.steps} steps of "
        f"{size.batch}; accuracies of {size.test:,} test images. Mean: on new images. Parameters: "
        "share of the network's; seconds: of tuning with what goes before, as profiles."
    )
    return Outcome(
        "RQ3: re-adaptation to other images, and repair",
        [Section("rq3", "Accuracy after tuning", note, COLUMNS, results)],
        lambda path: figures.bars(shown, "accuracy (%), mean over shifts", path),
    )
