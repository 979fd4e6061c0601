"""What observing a model adds to its forward pass, with every site on.

python -m bench.profiler            batches of 64 at 224 x 224, writes bench/results/
python -m bench.profiler --quick    batches of 8, few rounds, nothing written

ResNet-50 and ViT-B/16 as in transformers, with random weights: time does not depend on them. The
last line is one JSON object: per model `overhead`, the added share of the forward pass. Each round
runs both ways, in turn first and second, and the median over rounds is reported.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import neusemslice as nss
from bench.report import Column, Ratio, Result, Section
from neusemslice import reference

CLASSES = 1000
COLUMNS = (
    Column("batch", "batch", "number"),
    Column("sites", "sites", "number"),
    Column("neurons", "neurons", "number"),
    Column("ms", "forward ms", "number"),
    Column("overhead", "added by observing", "share", in_summary=True),
    Column("state", "state MiB", "number"),
    Column("growth", "MiB grown over the rounds", "number"),
)
NOTE = (
    "All five statistics of every site, 1000 classes, fp32, evaluation mode. “added by observing”: "
    "share of the forward pass. “grown”: by how much the process's peak memory rose after the "
    "first observed batch."
)


def resnet50() -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(num_labels=CLASSES))


def vit_base() -> nn.Module:
    return ViTForImageClassification(ViTConfig(num_labels=CLASSES))


MODELS = {"ResNet-50": resnet50, "ViT-B/16": vit_base}


def check(model: nn.Module) -> None:
    """Raises unless the last site's mean is that of what its reader reads."""
    x, y = torch.randn(4, 3, 224, 224), torch.tensor([0, 1, 0, 1])
    profiler = nss.Profiler(model, x[:2], num_classes=2)
    site = profiler.graph.sites[-1]
    reader = site.readers[0]
    seen: list[Tensor] = []
    hook = model.get_submodule(reader.module).register_forward_pre_hook(
        lambda _, args: seen.append(reader.take(args[0], site.neurons))
    )
    with profiler.batch(y):
        model(x)
    hook.remove()
    expected = reference.class_stats(seen[0], y, 2, neuron_dim=reader.neuron_dim)
    torch.testing.assert_close(
        profiler.profile.activations[site.name].mean, expected.mean, rtol=1e-5, atol=1e-6
    )


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, batch: int, rounds: int) -> Result:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    check(model)
    x, y = torch.randn(batch, 3, 224, 224), torch.arange(batch) % CLASSES
    profiler = nss.Profiler(model, x[:2], num_classes=CLASSES)

    def plain() -> None:
        model(x)

    def observed() -> None:
        with profiler.batch(y):
            model(x)

    times, added = [], []
    with profiler:
        plain()
        observed()
        before = peak_mebibytes()
        for i in range(rounds):
            first, second = (plain, observed) if i % 2 else (observed, plain)
            took = {first: seconds(first), second: seconds(second)}
            times.append(took[plain])
            added.append(took[observed] / took[plain] - 1)
    state = sum(t.nbytes for t in profiler.profile.state_dict().values())
    return Result(
        name,
        {
            "batch": batch,
            "sites": len(profiler.graph.sites),
            "neurons": profiler.graph.neurons,
            "ms": statistics.median(times) * 1e3,
            "overhead": Ratio.of(added),
            "state": state / 2**20,
            "growth": peak_mebibytes() - before,
        },
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds")
    quick = parser.parse_args().quick
    console = Console(width=140)
    section = Section("profiler", "Observing a model", NOTE, COLUMNS, [])
    for name in MODELS:
        section.results.append(measure(name, batch=8 if quick else 64, rounds=4 if quick else 6))
        console.print(f"{name}: done", style="dim")
    section.show(console)
    if not quick:
        console.print(f"written: {section.write().name}")
    print(section.summary())


if __name__ == "__main__":
    main()
