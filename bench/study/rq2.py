"""RQ2: how far a network can be compressed, and what is left of its accuracy at equal cost.

Compression: LAMP, Global, Uniform+ and ERK remove a fifth of the weights that are left in each
iteration and fine-tune, until the accuracy budget is spent; alone, after DeepArc has removed
layers, and after slicing has removed neurons. The protocol is that of ``bench/compression.py``.
A network without layers is fine-tuned, which is an iteration too; of DeepArc's thresholds the one
counts that removes most and keeps the budget then, and trying the others is not counted.

At equal multiply-adds: torch-pruning's pruner, with each of its importances, removes half of them
or, where neurons are few, a little more; ours has no more left. Then all fine-tune for the same
steps at a learning rate that the first seed's validation images choose.

A row's mean is the compression rate (the network's parameters over those that are left), or the
accuracy. Budgets count on validation images, accuracies are of test images.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch_pruning as tp
from torch import nn
from torch_pruning.pruner import importance

import neusemslice as nss
from bench import compression
from bench.cifar import Block
from bench.compression import RATE, Batches, First, Subject
from bench.mixed import mixed
from bench.report import Column, Result, Section
from bench.runs import RUNS
from bench.stream import Stream
from bench.study import figures, layers
from bench.study.networks import DIGITS, NETWORKS, Network
from bench.study.outcome import SPREAD, Outcome, spread
from neusemslice.maintain import finetune, score
from neusemslice.maintain.sparsity import METHODS

BATCH = 128
TEST_BATCH = 100
FIRSTS: tuple[First, ...] = ("slicing", "layers", "nothing")
SHOWN = {"nothing": "alone", "layers": "layers removed first (DeepArc)", "slicing": "slicing first"}
MACS = 0.5
OURS = "ours"
PRUNERS: dict[str, Callable[[], importance.Importance]] = {
    "L2": lambda: importance.GroupMagnitudeImportance(p=2),
    "L1": lambda: importance.GroupMagnitudeImportance(p=1),
    "LAMP": importance.LAMPImportance,
    "FPGM": importance.FPGMImportance,
    "BN scale": importance.BNScaleImportance,
    "Taylor": importance.GroupTaylorImportance,
}
"""Torch-pruning's importances, used by its pruner with equal shares of every layer."""

RATES_COLUMNS = (
    *SPREAD,
    Column("iterations", "iterations", "number"),
    Column("accuracy", "accuracy %", "number"),
    Column("whole", "whole %", "number"),
    Column("begun", "left by what goes first %", "number"),
)
COST_COLUMNS = (
    *SPREAD,
    Column("before", "before fine-tuning %", "number"),
    Column("macs", "multiply-adds left %", "number"),
    Column("parameters", "parameters left %", "number"),
    Column("rate", "learning rate", "text"),
)


NOTE = (
    "Mean: the network's parameters over those that are left. Budgets: 1 point on MNIST and "
    "digits, 3 on CIFAR-10. Removing layers is an iteration, slicing trains nothing."
)
COST_NOTE = (
    "Mean: test accuracy after {0.tuning_steps} steps of fine-tuning. Torch-pruning's importances "
    "take equal shares of every layer; ours chooses its budgets and compensates without labels."
)


@dataclass(frozen=True)
class Size:
    """How much of everything the study has."""

    networks: tuple[Network, ...]
    methods: tuple[Any, ...]
    pruners: tuple[str, ...]
    steps: int
    tuning_steps: int
    calibration: int
    validation: int
    rates: tuple[float, ...]


FULL = Size(
    tuple(network for network in NETWORKS if not network.name.startswith("ViT")),
    METHODS,
    tuple(PRUNERS),
    steps=60,
    tuning_steps=200,
    calibration=2_000,
    validation=2_000,
    rates=(1e-3, 3e-3),
)
QUICK = Size(
    (DIGITS,),
    METHODS[:2],
    ("L2", "Taylor"),
    steps=5,
    tuning_steps=5,
    calibration=400,
    validation=120,
    rates=(3e-3,),
)


def subject(network: Network, size: Size, seed: int) -> Subject:
    """A trained network as the study of compression takes it."""
    data, model = network.data(), network.trained(seed)
    return Subject(
        f"{network.name}, {network.epochs} epochs, seed {seed}",
        mixed(model) if network.mixed else model,
        lambda steps: Stream(data.train, BATCH, steps, seed, data.prepared),
        data.batches(data.train[: size.calibration], TEST_BATCH),
        data.batches(data.validation[: size.validation], TEST_BATCH),
        data.batches(data.test, TEST_BATCH),
        budget=0.03 if "CIFAR" in network.name else 0.01,
    )


class Study(compression.Study):
    """All runs of one network and seed."""

    def __init__(self, subject: Subject, size: Size, kept: Path | None) -> None:
        super().__init__(subject, size.steps, kept)
        self.size = size

    def begin(self, first: First) -> tuple[nn.Module, int]:
        return self.fewer_layers if first == "layers" else super().begin(first)

    @cached_property
    def fewer_layers(self) -> tuple[nn.Module, int]:
        """The network without as many layers as the budget allows, and one iteration for it."""
        own = self.subject
        alike = layers.likeness(own.model, own.calibration)
        tried = set()
        for threshold in layers.THRESHOLDS:
            count = sum(value > threshold for value in alike)
            model = layers.without(own.model, alike, threshold)
            if model is None or count in tried:
                continue
            tried.add(count)
            finetune(model, own.training(self.steps), epochs=1, lr=RATE, teacher=self.teacher)
            if score(model, own.validation, "layers").accuracy >= self.whole - own.budget:
                return model, 1
        return own.model, 0

    def compressed(self, method: Any, first: First) -> dict[str, Any]:
        key = f"{self.subject.name}, {method}, first {first}, {self.steps} steps"
        found = self.once(key, partial(self.run, method, "weight", first))
        return {name: found[name] for name in ("rate", "iterations", "accuracy", "begun")}

    def run(self, method: Any, granularity: Any, first: First) -> dict[str, Any]:
        """As alone, where nothing could be removed first."""
        if first != "nothing" and self.begin(first)[0] is self.subject.model:
            return {**self.compressed(method, "nothing"), "begun": 100.0}
        return super().run(method, granularity, first)

    @cached_property
    def peers(self) -> tuple[float, float]:
        """The smallest share of all layers' neurons without which no more than ``MACS`` is left,
        and the multiply-adds then; they are the same for all importances."""
        own = self.subject
        allowed = MACS * cost_of(own.model, own.calibration)[0]
        low, high, left = 0.0, 1.0, math.inf
        for _ in range(10):
            removed = (low + high) / 2
            smaller = pruned(own.model, PRUNERS["L2"](), own.calibration, removed)
            macs, _ = cost_of(smaller, own.calibration)
            if macs > allowed:
                low = removed
            else:
                high, left = removed, macs
        if left > allowed:
            raise ValueError(f"{own.name}: torch-pruning cannot remove half of the multiply-adds")
        return high, left

    def pruners(self) -> list[str]:
        """Those importances that rank every layer: scales of norms want one behind each."""
        kinds = [type(m) for m in self.subject.model.modules()]
        scaled = kinds.count(nn.BatchNorm2d) >= kinds.count(nn.Conv2d) > 0
        return [name for name in self.size.pruners if scaled or name != "BN scale"]

    def cut(self, method: str) -> nn.Module:
        """The network with half of its multiply-adds, or a little less."""
        own = self.subject
        if method == OURS:
            return copy.deepcopy(self.ours)
        return pruned(own.model, PRUNERS[method](), own.calibration, self.peers[0])

    @cached_property
    def ours(self) -> nn.Module:
        """Restructured until it has no more multiply-adds than the peers."""
        own, allowed = self.subject, self.peers[1]
        share = allowed / cost_of(own.model, own.calibration)[0]
        while True:  # the library counts biases and norms as well
            found = nss.restructure(
                own.model, self.slicing, calibration=own.calibration, macs=share, round_to=1
            ).model
            if cost_of(found, own.calibration)[0] <= allowed:
                return found
            share -= 0.005

    def tuned(self, method: str, rate: float) -> dict[str, Any]:
        """Accuracy before and after fine-tuning, on validation and on test images, percent."""
        own = self.subject
        model = self.cut(method)
        cost, whole = (cost_of(m, own.calibration) for m in (model, own.model))
        before = score(model, own.test, method).accuracy
        finetune(model, own.training(self.size.tuning_steps), epochs=1, lr=rate)
        return {
            "before": 100 * before,
            "validation": 100 * score(model, own.validation, method).accuracy,
            "accuracy": 100 * score(model, own.test, method).accuracy,
            "macs": 100 * cost[0] / whole[0],
            "parameters": 100 * cost[1] / whole[1],
        }

    def at_equal_cost(self, method: str, rate: float) -> dict[str, Any]:
        steps = self.size.tuning_steps
        key = f"{self.subject.name}, {method} at {MACS:g}, rate {rate:g}, {steps} steps"
        found: dict[str, Any] = self.once(key, partial(self.tuned, method, rate))
        return found


def cost_of(model: nn.Module, calibration: Batches) -> tuple[float, float]:
    """Multiply-adds of one image, and parameters."""
    macs, parameters = tp.utils.count_ops_and_params(model, calibration[0][0][:1])
    return float(macs), float(parameters)


def pruned(
    model: nn.Module, ranks: importance.Importance, calibration: Batches, removed: float
) -> nn.Module:
    """A copy without a share of every layer's neurons, cut by torch-pruning.

    Of residual networks the streams stay whole: the library cannot cut padded shortcuts.
    """
    own = copy.deepcopy(model)
    if isinstance(ranks, importance.GroupTaylorImportance):
        total = sum(len(y) for _, y in calibration)
        for x, y in calibration:
            (nn.functional.cross_entropy(own(x), y, reduction="sum") / total).backward()
    kept = [m for m in own.modules() if isinstance(m, nn.Linear)][-1:]
    blocks = [m for m in own.modules() if isinstance(m, Block)]
    if blocks:
        kept += [next(m for m in own.modules() if isinstance(m, nn.Conv2d))]
        kept += [block.conv2 for block in blocks]
    example = calibration[0][0][:2]
    tp.pruner.BasePruner(
        own, example, ranks, pruning_ratio=removed, max_pruning_ratio=0.99, ignored_layers=kept
    ).step()
    own.zero_grad()
    return own


Found = dict[tuple[str, str], list[dict[str, Any]]]
"""By network and method, a run for each seed."""


def run(quick: bool, seeds: int) -> Outcome:
    """Both tables and the figure."""
    size = QUICK if quick else FULL
    kept = None if quick else RUNS / "study-rq2.json"
    networks = [network for network in size.networks if network.missing() is None]
    rates: Found = {}
    costs: Found = {}
    wholes: dict[str, list[float]] = {}
    best: dict[tuple[str, str], float] = {}
    for network, seed in itertools.product(networks, range(seeds)):
        study = Study(subject(network, size, seed), size, kept)
        own = study.subject
        whole = partial(score, own.model, own.test, "whole")
        accuracy = study.once(f"{own.name}, whole", lambda whole=whole: 100 * whole().accuracy)
        wholes.setdefault(network.name, []).append(accuracy)
        for method, first in itertools.product(size.methods, FIRSTS):
            row = (network.name, f"{method}, {SHOWN[first]}")
            rates.setdefault(row, []).append(study.compressed(method, first))
        for method in (OURS, *study.pruners()):
            row = (network.name, method)
            if row not in best:  # the first seed's
                found = {rate: study.at_equal_cost(method, rate) for rate in size.rates}
                best[row] = max(found, key=lambda rate: found[rate]["validation"])
            costs.setdefault(row, []).append(study.at_equal_cost(method, best[row]))
    compressed = [
        Result(
            ": ".join(row),
            {
                **spread([run["rate"] for run in found]),
                **means(found, ("iterations", "accuracy")),
                "whole": statistics.mean(wholes[row[0]]),
                "begun": statistics.mean(begun) if None not in begun else None,
            },
        )
        for row, found in rates.items()
        for begun in ([run["begun"] for run in found],)
    ]
    equal = [
        Result(
            f"{name}: {method}, {MACS:.0%} of multiply-adds",
            {
                **spread([run["accuracy"] for run in found]),
                **means(found, ("before", "macs", "parameters")),
                "rate": f"{best[name, method]:g}",
            },
        )
        for (name, method), found in costs.items()
    ]
    panels: dict[str, Any] = {}
    for (name, row), found in rates.items():
        method, _, first = row.partition(", ")
        panels.setdefault(name, {}).setdefault(method, {})[first] = [run["rate"] for run in found]
    return Outcome(
        "RQ2: compression, and accuracy at equal cost",
        [
            Section(
                "rates",
                "Compression rate within an accuracy budget",
                NOTE,
                RATES_COLUMNS,
                compressed,
            ),
            Section(
                "cost",
                "Accuracy at equal multiply-adds",
                COST_NOTE.format(size),
                COST_COLUMNS,
                equal,
            ),
        ],
        lambda path: figures.bars(panels, "compression rate (×)", path),
    )


def means(found: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, float]:
    return {name: float(statistics.mean(run[name] for run in found)) for name in names}
