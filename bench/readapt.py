"""Re-adaptation to a real shift: networks of the original CIFAR-10 meet its JPEGs.

python -m bench.readapt            everything, writes bench/results/readapt.{md,json}; hours
python -m bench.readapt --quick    few images and steps, one seed, nothing written; under a minute

Each method takes the same steps (AdamW, batches of 128 augmented images, learning rate falling
linearly to 0) and chooses its learning rate, and whether batch norms keep their running statistics
or normalise by the batch and let these follow, from the same grid with the same number of short
runs on the smaller network and many images; these are judged on training images that no run trains
on. Test images are looked at once, after the last step. With all 50,000 images the smaller network
goes through them once.

``bench/runs.py`` says how an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import neusemslice as nss
from bench import cifar
from bench.mixed import mixed
from bench.report import Column, Ratio, Result, Section, Target
from bench.runs import RUNS, Runs
from bench.stream import Stream, random_parts
from bench.tuning import (
    BUDGET,
    DEEPARC,
    METHODS,
    Choice,
    network,
    observe,
    random_neurons,
    redundant_layers,
    right,
    some,
    step,
    tune,
    tuning,
)
from neusemslice.maintain import recalibrate
from neusemslice.maintain.drift import choose, component_drift, neuron_drift
from neusemslice.maintain.readapt import profiled_batches

KEPT = RUNS / "readapt.json"
COLUMNS = (
    Column("seeds", "seeds", "number"),
    Column("mean", "accuracy %", "number", in_summary=True),
    Column("std", "± std", "number"),
    Column("against_full", "− full, points", "number", in_summary=True),
    Column("lost", "lost to fewer samples, points", "number", in_summary=True),
    Column("flips", "once right, now wrong %", "number"),
    Column("neurons", "neurons tuned %", "number"),
    Column("parameters", "parameters tuned", "number"),
    Column("rate", "learning rate", "text"),
    Column("norms", "running statistics", "text"),
    Column("vs_full", "step, full ×", "times", in_summary=True),
    Column("run_vs_full", "run, full ×", "times", in_summary=True),
)
NOTE = (
    "Training in bfloat16 mixed precision. Test accuracy after tuning, mean and standard deviation "
    "over seeds. “Lost to fewer samples”: how far the accuracy with 1,000 new samples is below "
    "that with all 50,000. “Once right, now wrong”: share of the test images that the untuned "
    "network had right. “Full ×”: how many times longer full fine-tuning takes, steps "
    "interleaved; “run” counts the profile too, and the pass that renews statistics. The original "
    "images are not at hand, so the old profile is that of the same network with batch norms "
    "recalibrated to the JPEGs: what it would see if they met the statistics that they remember."
)


@dataclass(frozen=True)
class Setting:
    """One experiment: a network, how many new samples there are, and for how many steps."""

    network: str
    samples: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.network}, {self.samples:,} new samples, {self.steps} steps"


@dataclass(frozen=True)
class Size:
    """How much of everything a study has."""

    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    batch: int
    search_steps: int
    profiled: int
    test: int
    rounds: int


FULL = Size(
    settings=(
        Setting("ResNet-20", 50_000, 391),
        Setting("ResNet-20", 1_000, 80),
        Setting("ResNet-56", 50_000, 120),
        Setting("ResNet-56", 1_000, 80),
    ),
    seeds=(0, 1, 2),
    rates=(3e-4, 1e-3, 3e-3, 1e-2),
    batch=128,
    search_steps=100,
    profiled=4_000,
    test=10_000,
    rounds=20,
)
QUICK = Size(
    settings=(Setting("ResNet-20", 500, 3), Setting("ResNet-20", 100, 2)),
    seeds=(0,),
    rates=(1e-3,),
    batch=16,
    search_steps=1,
    profiled=250,
    test=200,
    rounds=2,
)


class Study(Runs):
    """All runs of one size."""

    def __init__(self, size: Size, kept: Path | None) -> None:
        super().__init__(kept)
        self.size = size
        images = cifar.load("train")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images = images[order]
        test = cifar.load("test")[: size.test]
        self.validation, self.test = (test[part] for part in random_parts(len(test), 0.25))
        self._slicings: dict[str, nss.SemanticSlicing] = {}
        self._ours: dict[str, nss.Slice] = {}
        self._untuned: dict[str, Tensor] = {}

    def untuned(self, name: str) -> Tensor:
        """Which test images the untuned network answers rightly."""
        if name not in self._untuned:
            self._untuned[name] = right(network(name), self.test)
        return self._untuned[name]

    def slicing(self, name: str) -> nss.SemanticSlicing:
        """Of the network as its batch norms remember the old images."""
        if name not in self._slicings:
            remembering = network(name)
            some = self.images[: self.size.profiled].batches()
            recalibrate(remembering, some)
            self._slicings[name] = nss.slice(nss.profile(remembering, some), threshold=0.95)
        return self._slicings[name]

    def ours(self, name: str) -> nss.Slice:
        """The neurons that ours tunes where there are many new images."""
        if name not in self._ours:
            slicing = self.slicing(name)
            new = self.images[: self.size.profiled].batches()
            drift = neuron_drift(slicing, nss.profile(network(name), new, ("avg",)))
            allowed = int(BUDGET * slicing.profile.graph.neurons)
            self._ours[name], _ = choose(slicing, component_drift(slicing, drift), allowed)
        return self._ours[name]

    def tuned(
        self, method: str, setting: Setting, choice: Choice, stream: Stream, seed: int
    ) -> tuple[nn.Module, nss.Slice]:
        """A network after tuning, and neurons: those tuned by rows, or those that ours tunes."""
        model = mixed(network(setting.network))
        slicing = self.slicing(setting.network)
        chance = method == "random neurons"
        rows = random_neurons(slicing, seed) if chance else self.ours(setting.network)
        found = tune(method, model, slicing, rows, choice, stream)
        return found.model, found.neurons

    def search(self, method: str, setting: Setting) -> Choice:
        """The choice that is best on validation images after few steps."""
        steps = min(self.size.search_steps, setting.steps)

        def judged(choice: Choice) -> float:
            stream = Stream(some(self.images, setting.samples, 0), self.size.batch, steps, 0)
            model, _ = self.tuned(method, setting, choice, stream, 0)
            return 100 * float(right(model, self.validation).double().mean())

        found = {}
        for choice in itertools.product(self.size.rates, (False, True)):
            chosen = Choice(*choice)
            key = f"search {setting.samples}, {method}, {chosen}, {steps} steps"
            found[chosen] = self.once(key, partial(judged, chosen))
        return max(found, key=lambda chosen: found[chosen])

    def measure(self, method: str, setting: Setting, choice: Choice, seed: int) -> dict[str, Any]:
        """Test accuracy after tuning, and how much of what was right is wrong now."""
        images = some(self.images, setting.samples, seed)
        stream = Stream(images, self.size.batch, setting.steps, seed)
        model, neurons = self.tuned(method, setting, choice, stream, seed)
        before, after = self.untuned(setting.network), right(model, self.test)
        return {
            "accuracy": 100 * float(after.double().mean()),
            "flips": 100 * float((before & ~after).double().mean()),
            "neurons": 100 * neurons.density,
        }

    def times(self, name: str, following: Collection[str]) -> dict[str, dict[str, Any]]:
        """Per method the parameters that it trains, and how many of its steps fit into one of full.

        The running statistics of some methods follow the new images.
        Steps of all methods are interleaved; so are profiled batches, as ``"profile"``.
        """
        slicing = self.slicing(name)
        batches = Stream(self.images, self.size.batch, 1, 0)
        x, y = next(iter(batches))
        runs: dict[str, Callable[[], object]] = {}
        counts = {}
        with ExitStack() as stack:
            for method in METHODS:
                by_rows = method == "random neurons"
                neurons = random_neurons(slicing, 0) if by_rows else self.ours(name)
                untuned = mixed(network(name))
                layers = redundant_layers(untuned, batches) if method == DEEPARC else ()
                model, optimizer = stack.enter_context(
                    tuning(method, untuned, neurons, 1e-4, layers)
                )
                trained = [p for group in optimizer.param_groups for p in group["params"]]
                for parameter in model.parameters():
                    parameter.requires_grad_(False)
                for parameter in trained:
                    parameter.requires_grad_(True)
                model.train(method in following)
                counts[method] = sum(p.numel() for p in trained)
                runs[method] = partial(step, model, optimizer, x, y)
            observed = network(name)
            profiler = nss.Profiler(observed, x[:2], ("avg",))
            runs["profile"] = partial(observe, observed, profiler, x, y)
            seconds: dict[str, list[float]] = {method: [] for method in runs}
            for run in runs.values():
                run()
            for _ in range(self.size.rounds):
                for method, run in runs.items():
                    begin = time.perf_counter()
                    run()
                    seconds[method].append(time.perf_counter() - begin)
        return {
            method: {
                "parameters": counts.get(method),
                "ms": 1e3 * statistics.median(seconds[method]),
                "per_full": [
                    full / own for full, own in zip(seconds["full"], seconds[method], strict=True)
                ],
            }
            for method in runs
        }


def study(size: Size, kept: Path | None) -> Section:
    """All runs, as a table."""
    study = Study(size, kept)
    searched = size.settings[0]
    names = dict.fromkeys(setting.network for setting in size.settings)
    choices = {method: study.search(method, searched) for method in METHODS}
    following = [method for method in METHODS if choices[method].renewed]
    runs = {}
    for setting, method in itertools.product(size.settings, METHODS):
        choice = choices[method]
        runs[setting, method] = [
            study.once(
                f"{setting.name}, {method}, {choice}, seed {seed}",
                partial(study.measure, method, setting, choice, seed),
            )
            for seed in size.seeds
        ]
    times = {
        name: study.once(
            f"times {name}, statistics follow: {', '.join(following)}",
            partial(study.times, name, following),
        )
        for name in names
    }
    means = {key: statistics.mean(run["accuracy"] for run in some) for key, some in runs.items()}
    results = []
    for setting in size.settings:
        most = max(
            (s for s in size.settings if s.network == setting.network), key=lambda s: s.samples
        )
        untuned = study.untuned(setting.network)
        results.append(
            Result(f"{setting.name}: untuned", {"mean": 100 * float(untuned.double().mean())})
        )
        for method in METHODS:
            choice, found, taken = (
                choices[method],
                runs[setting, method],
                times[setting.network],
            )
            accuracies = [run["accuracy"] for run in found]
            values = {
                "seeds": len(found),
                "accuracies": accuracies,
                "mean": means[setting, method],
                "std": statistics.stdev(accuracies) if len(found) > 1 else None,
                "against_full": means[setting, method] - means[setting, "full"],
                "flips": statistics.mean(run["flips"] for run in found),
                "parameters": taken[method]["parameters"],
                "rate": f"{choice.rate:g}",
                "norms": "follow" if choice.renewed else "kept",
                "vs_full": Ratio.of(taken[method]["per_full"]),
            }
            if setting is not most:
                values["lost"] = means[most, method] - means[setting, method]
            if method in ("ours", "random neurons"):
                values["neurons"] = found[0]["neurons"]
            if method == "ours":
                batches = profiled_batches(setting.steps, size.batch, len(cifar.CLASSES))
                batches *= 1 + choice.renewed  # another pass, for the first statistics
                values["run_vs_full"] = Ratio.of(
                    [
                        setting.steps / (setting.steps / own + batches / profiled)
                        for own, profiled in zip(
                            taken[method]["per_full"], taken["profile"]["per_full"], strict=True
                        )
                    ]
                )
            results.append(Result(f"{setting.name}: {method}", values))
    return Section("readapt", "Re-adaptation to the JPEGs of CIFAR-10", NOTE, COLUMNS, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and steps, one seed")
    quick = parser.parse_args().quick
    if reason := cifar.missing():
        raise SystemExit(f"bench.readapt: {reason}")
    section = study(QUICK if quick else FULL, None if quick else KEPT)
    section.show(Console())
    if not quick:
        target = Target(
            "readapt",
            "Re-adaptation to a real shift",
            "Accuracies of the test images; “full ×”: above 1 is better for us.",
            Target.this_machine().compiler,
            Target.this_machine().about,
        )
        print(f"wrote {section.write(target)}")
    print(section.summary())


if __name__ == "__main__":
    main()
