"""Restructuring ResNet-20 on CIFAR-10: accuracy against torch-pruning's importances, and latency.

python -m bench.restructure            everything, writes bench/results/restructure.{md,json}; hours
python -m bench.restructure --quick    few images and steps, one seed, nothing written

One shot: 30, 50 and 70 % of each block's inner channels are removed and all test images answered.
2,000 training images are all that anyone sees: their labels rank channels (ours by Taylor shares of
the classes, and where compensation follows by what the others cannot make up for as well; see
bench/importances.py for the others), compensation uses none. Each importance is also given batch
norms whose statistics are estimated anew on the same images, and the best one of each share our
compensation. All keep the same widths, but for ours with its own budgets, of which there are at
most as many multiply-adds.

Fine-tuned: half of the inner channels (ours with its own budgets) removed, then one epoch of
augmented images with the same optimizer, order and steps for all. Each method chooses its learning
rate from the same grid by the mean over all seeds, judged on a random quarter of the test images:
the network has seen all training images. The table's accuracies are of the other three quarters.

Latency: of 64 images, interleaved with the whole model; ours with its own budgets, compensated.

``bench/runs.py`` says how an interrupted study goes on.
The last line is one JSON object: accuracies in percent, and points above the best importance.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import neusemslice as nss
from bench import cifar
from bench.importances import IMPORTANCES, inner_layers, ranking
from bench.report import Column, Ratio, Result, Section, Target
from bench.runs import RUNS, Runs
from bench.stream import Stream, random_parts
from neusemslice.maintain import finetune, plan, recalibrate

KEPT = RUNS / "restructure.json"
NAME = "resnet20_cifar10_jpeg"
OURS, BUDGETED = "ours, equal shares", "ours"

ONE_SHOT = (
    Column("plain", "as cut %", "number", in_summary=True),
    Column("renewed", "statistics anew %", "number"),
    Column("compensated", "compensated %", "number", in_summary=True),
    Column("above", "above the best importance, points", "number", in_summary=True),
)
TUNED = (
    Column("before", "before %", "number"),
    Column("accuracy", "accuracy %", "number", in_summary=True),
    Column("std", "± std", "number"),
    Column("above", "above it, points", "number", in_summary=True),
    Column("worst", "worst class, points", "number", in_summary=True),
    Column("rate", "learning rate", "text"),
    Column("classes", "per class %", "text"),
)
LATENCY = (
    Column("macs", "multiply-adds left %", "number"),
    Column("widths", "inner channels", "text"),
    Column("ms", "ms", "number"),
    Column("faster", "whole ×", "times", in_summary=True),
    Column("wanted", "share wanted", "number"),
    Column("got", "share got", "number"),
)


@dataclass(frozen=True)
class Size:
    """How much of everything a study has."""

    calibration: int
    removed: tuple[float, ...]
    importances: tuple[str, ...]
    test: int
    rates: tuple[float, ...]
    steps: int
    batch: int
    seeds: tuple[int, ...]
    rounds: int
    latencies: tuple[float, ...]


FULL = Size(
    calibration=2_000,
    removed=(0.5, 0.3, 0.7),
    importances=tuple(IMPORTANCES),
    test=10_000,
    rates=(1e-3, 2e-3, 3e-3, 5e-3),
    steps=391,
    batch=128,
    seeds=(0, 1, 2),
    rounds=20,
    latencies=(0.7,),
)
QUICK = Size(
    calibration=100,
    removed=(0.5,),
    importances=("L1, group", "Taylor", "random"),
    test=200,
    rates=(3e-3,),
    steps=3,
    batch=16,
    seeds=(0,),
    rounds=3,
    latencies=(),  # whether one can be met, a busy machine decides
)


class Study(Runs):
    """All runs of one size."""

    def __init__(self, size: Size, kept: Path | None) -> None:
        super().__init__(kept)
        self.size = size
        images = cifar.load("train")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images = images[order]
        self.calibration = self.images[: size.calibration].batches()
        self.test = cifar.load("test")[: size.test]
        self.parts = [self.test[part] for part in random_parts(len(self.test), 0.25)]
        self._cut: dict[tuple[str, float, bool], nn.Module] = {}

    @cached_property
    def model(self) -> cifar.ResNet:
        """The whole network."""
        return cifar.trained(NAME).to(memory_format=torch.channels_last)

    @cached_property
    def slicing(self) -> nss.SemanticSlicing:
        return nss.slice(nss.profile(self.model, self.calibration), metric="taylor")

    def order(self, importance: str) -> dict[str, list[int]]:
        """Each block's inner channels by an importance of torch-pruning."""
        images = self.images[: self.size.calibration]
        found: dict[str, list[int]] = self.once(
            f"order, {importance}", partial(ranking, self.model, importance, images)
        )
        return found

    def cut(self, method: str, removed: float, compensate: bool) -> nn.Module:
        """The network without the channels that a method finds least important; a copy."""
        key = method, removed, compensate
        if key not in self._cut:
            self._cut[key] = self._made(*key)
        return copy.deepcopy(self._cut[key])

    def _made(self, method: str, removed: float, compensate: bool) -> nn.Module:
        folded = self.calibration if compensate else None
        planned = plan(self.model, self.slicing, calibration=folded, keep=1 - removed)
        kept = planned.kept
        if method == BUDGETED:
            share = planned.macs[1] / planned.macs[0]
            kept = plan(self.model, self.slicing, calibration=folded, macs=share, round_to=1).kept
        elif method != OURS:
            order, masks = self.order(method), kept.masks()
            for layer in inner_layers(self.model):
                mask = torch.zeros_like(masks[layer])
                mask[order[layer][: int(masks[layer].sum())]] = True
                masks[layer] = mask
            kept = nss.Slice(kept.graph, masks)
        return nss.restructure(
            self.model, kept, calibration=self.calibration, compensate=compensate
        ).model

    def one_shot(self, method: str, removed: float, how: str) -> float:
        """Test accuracy in percent without any training."""
        model = self.cut(method, removed, how == "compensated")
        if how == "renewed":
            recalibrate(model, self.calibration)
        return 100 * float(right(model, self.test).double().mean())

    def tuned(self, method: str, rate: float, seed: int) -> nn.Module:
        """The network with half of its inner channels, or as many multiply-adds, fine-tuned."""
        model = self.cut(method, 0.5, method == BUDGETED)
        stream = Stream(self.images, self.size.batch, self.size.steps, seed)
        finetune(model, stream, epochs=1, lr=rate)
        return model

    def by_class(self, method: str, rate: float, seed: int) -> list[list[float]]:
        """Test accuracy of each class in percent after fine-tuning, of each part of the images."""

        def run() -> list[list[float]]:
            model = self.tuned(method, rate, seed)
            hits = [(part.labels, right(model, part).double()) for part in self.parts]
            return [[100 * float(h[y == k].mean()) for k in range(10)] for y, h in hits]

        key = f"tuned, {method}, {rate:g}, {self.size.steps} steps, seed {seed}, by part"
        found: list[list[float]] = self.once(key, run)
        return found

    def rate(self, method: str) -> float:
        """The learning rate that is best on the first part of the test images, mean over seeds."""

        def judged(rate: float) -> float:
            runs = (self.by_class(method, rate, seed)[0] for seed in self.size.seeds)
            return statistics.mean(map(statistics.mean, runs))

        return max(self.size.rates, key=judged)

    def times(self, **target: Any) -> dict[str, Any]:
        """How much faster than the whole network, rounds interleaved."""
        batches = self.images[: self.size.calibration].batches(64)
        x = batches[0][0].contiguous(memory_format=torch.channels_last)
        found = nss.restructure(self.model, self.slicing, calibration=batches, **target)
        runs = (self.model, found.model)
        seconds: list[list[float]] = [[], []]
        with torch.inference_mode():
            for number in range(self.size.rounds + 2):
                for own, model in zip(seconds, runs, strict=True):
                    begin = time.perf_counter()
                    model(x)
                    if number >= 2:
                        own.append(time.perf_counter() - begin)
        widths = [found.report.widths[layer][1] for layer in inner_layers(self.model)]
        return {
            "macs": 100 * found.report.after.macs / found.report.before.macs,
            "widths": " ".join(map(str, widths)),
            "ms": 1e3 * statistics.median(seconds[1]),
            "ratios": [whole / own for whole, own in zip(*seconds, strict=True)],
        }


@torch.inference_mode()
def right(model: nn.Module, images: cifar.Images) -> Tensor:
    """Which images a model answers rightly, bool ``[N]``; small batches stay in the cache."""
    model = model.eval().to(memory_format=torch.channels_last)
    parts = images.batches(50)
    return torch.cat(
        [model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y for x, y in parts]
    )


def best(study: Study, removed: float) -> list[str]:
    """The importances by their accuracy, as cut or with statistics anew, the best first."""

    def reached(name: str) -> float:
        ways = (partial(study.one_shot, name, removed, how) for how in ("plain", "renewed"))
        keys = (f"one shot {removed:g}, {name}, {how}" for how in ("plain", "renewed"))
        return max(study.once(key, way) for key, way in zip(keys, ways, strict=True))

    return sorted(study.size.importances, key=reached, reverse=True)


def one_shot(study: Study) -> Section:
    results = [
        Result("whole", {"plain": study.once("whole", lambda: percent(study.model, study.test))})
    ]
    for removed in study.size.removed:
        ranked = best(study, removed)
        found = {}
        for name in (BUDGETED, OURS, *ranked):
            ways = ["plain", "renewed"]
            if name in (BUDGETED, OURS, ranked[0]):
                ways.append("compensated")
            found[name] = {
                how: study.once(
                    f"one shot {removed:g}, {name}, {how}",
                    partial(study.one_shot, name, removed, how),
                )
                for how in ways
            }
        peer = max(found[ranked[0]]["plain"], found[ranked[0]]["renewed"])
        for name in (BUDGETED, OURS):
            found[name]["above"] = found[name]["compensated"] - peer
        results += [Result(f"{removed:.0%} removed: {n}", values) for n, values in found.items()]
    note = (
        f"Accuracy on {len(study.test):,} test images without training; "
        f"{study.size.calibration:,} calibration images. “Above”: ours, compensated, over the best "
        "importance, as cut or with statistics anew."
    )
    return Section("one shot", "Restructured in one shot", note, ONE_SHOT, results)


def percent(model: nn.Module, images: cifar.Images) -> float:
    return 100 * float(right(model, images).double().mean())


def fine_tuned(study: Study) -> Section:
    methods = [BUDGETED]
    for name in best(study, study.size.removed[0]):  # some rank alike
        if len(methods) < 3 and study.order(name) not in map(study.order, methods[1:]):
            methods.append(name)
    classes: dict[str, Tensor] = {}
    results = []
    for seed in study.size.seeds:
        for method in methods:
            found = torch.tensor(study.by_class(method, study.rate(method), seed)[1])
            classes[method] = torch.cat([classes.get(method, found.new_empty(0, 10)), found[None]])
    means = {method: found.mean() for method, found in classes.items()}
    peer = max(methods[1:], key=lambda method: means[method])
    for method in methods:
        found = classes[method]
        each = found.mean(1)
        values = {
            "accuracy": float(each.mean()),
            "std": float(each.std()) if len(each) > 1 else None,
            "rate": f"{study.rate(method):g}",
            "classes": " ".join(f"{c:.1f}" for c in found.mean(0).tolist()),
        }
        if method == BUDGETED:
            values["above"] = float(means[method] - means[peer])
            values["worst"] = float((found.mean(0) - classes[peer].mean(0)).min())
        results.append(Result(f"tuned: {method}", values))
    note = (
        f"Half of the inner channels, then {study.size.steps} steps of {study.size.batch} images "
        f"with AdamW; mean over {len(study.size.seeds)} seeds. Ours starts from the compensated "
        f"network. “Above it”: over the better importance; “worst class”: ours against it, in the "
        "class that does worst."
    )
    return Section("tuned", "Restructured and fine-tuned", note, TUNED, results)


def latency(study: Study) -> Section:
    targets: dict[str, dict[str, Any]] = {
        f"multiply-adds 0.5, multiples of {n}": {"macs": 0.5, "round_to": n} for n in (1, 2, 4)
    }
    targets["multiply-adds 0.5"] = {"macs": 0.5}
    targets |= {f"latency {share:g}": {"latency": share} for share in study.size.latencies}
    results = []
    for name, target in targets.items():
        found = study.once(f"latency, {name}", partial(study.times, **target))
        ratio = Ratio.of(found["ratios"])
        values = {**found, "faster": ratio}
        if "latency" in target:
            values |= {"wanted": target["latency"], "got": 1 / ratio.median}
        results.append(Result(name, values))
    note = f"64 images, {torch.get_num_threads()} threads; “whole ×”: above 1 is faster."
    return Section("latency", "Latency of restructured models", note, LATENCY, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and steps, one seed")
    quick = parser.parse_args().quick
    if reason := cifar.missing():
        raise SystemExit(f"bench.restructure: {reason}")
    study = Study(QUICK if quick else FULL, None if quick else KEPT)
    sections = [part(study) for part in (one_shot, fine_tuned, latency)]
    console = Console()
    for section in sections:
        section.show(console)
    if not quick:
        target = Target(
            "restructure",
            "Restructuring against torch-pruning",
            "ResNet-20, JPEGs of CIFAR-10; accuracies in percent.",
            Target.this_machine().compiler,
            Target.this_machine().about,
        )
        for section in sections:
            path = section.write(target)
        print(f"wrote {path}")
    print(Section("all", "", "", (*ONE_SHOT, *TUNED, *LATENCY), merged(sections)).summary())


def merged(sections: list[Section]) -> list[Result]:
    return [result for section in sections for result in section.results]


if __name__ == "__main__":
    main()
