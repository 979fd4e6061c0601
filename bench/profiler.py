"""What observing a model adds to its forward pass, with every site on.

python -m bench.profiler            batches of 64 at 224 x 224, writes bench/results/
python -m bench.profiler --quick    batches of 8, few rounds, nothing written

ResNet-50 and ViT-B/16 as in transformers, with random weights: time does not depend on them; on a
GPU also a decoder of the shape of a 7B Llama. The last line is one JSON object: per model
`overhead`, the added share of the forward pass. Each round runs both ways, in turn first and
second, and the median over rounds is reported. What cannot be built or traced for want of a package
is left out, and said.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn

import neusemslice as nss
from bench import decoder
from bench.device import ON_GPU, use_device, wall_seconds
from bench.report import Column, Ratio, Result, Section, missing
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
    "All five statistics of every site, 1000 classes, fp32 if not said, evaluation mode. “added by "
    "observing”: share of the forward pass. “grown”: by how much peak memory, of the process or "
    "of what is allocated on the GPU, rose after the first observed batch."
)


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=CLASSES))


def vit_base() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=CLASSES))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224)


def traced(model: nn.Module, x: Tensor, num_classes: int) -> nss.Profiler:
    return nss.Profiler(model, x, num_classes=num_classes)


@dataclass(frozen=True)
class Case:
    """A model, a batch of so many inputs for it, what observes it, and the packages it needs."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor] = images
    profiler: Callable[[nn.Module, Tensor, int], nss.Profiler] = traced
    needs: tuple[str, ...] = ("transformers", "torch_pruning")
    batch: int = 64
    rtol: float = 1e-5


CASES = {"ResNet-50": Case(resnet50), "ViT-B/16": Case(vit_base)}
if ON_GPU:
    CASES["7B decoder, bf16"] = Case(
        decoder.decoder_7b, decoder.tokens, decoder.profiler, needs=(), batch=8, rtol=1e-4
    )


def check(model: nn.Module, case: Case) -> None:
    """Raises unless the last site's mean is that of what its reader reads."""
    x, y = case.inputs(4), torch.tensor([0, 1, 0, 1])
    profiler = case.profiler(model, x[:2], 2)
    site = profiler.graph.sites[-1]
    reader = site.readers[0]
    seen: list[Tensor] = []
    hook = model.get_submodule(reader.module).register_forward_pre_hook(
        lambda _, args: seen.append(reader.take(args[0], site.neurons))
    )
    with profiler.batch(y):
        model(x)
    hook.remove()
    mean = profiler.profile.activations[site.name].mean
    assert mean is not None
    with torch.device("cpu"):
        expected = reference.class_stats(seen[0].cpu(), y.cpu(), 2, neuron_dim=reader.neuron_dim)
    torch.testing.assert_close(mean.cpu(), expected.mean, rtol=case.rtol, atol=1e-6)


def peak_mebibytes() -> float:
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, batch: int, rounds: int) -> Result:
    torch.manual_seed(0)
    case = CASES[name]
    model = case.model().eval()
    check(model, case)
    x, y = case.inputs(batch), torch.arange(batch) % CLASSES
    profiler = case.profiler(model, x[:2], CLASSES)

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
            took = {first: wall_seconds(first), second: wall_seconds(second)}
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
    use_device()
    console = Console(width=140)
    section = Section("profiler", "Observing a model", NOTE, COLUMNS, [])
    rounds = 4 if quick else 24 if ON_GPU else 6
    for name, case in CASES.items():
        if absent := missing(*case.needs):
            console.print(f"{name} is left out: {absent}")
            continue
        section.results.append(measure(name, min(case.batch, 8) if quick else case.batch, rounds))
        console.print(f"{name}: done", style="dim")
        if not quick:
            section.write()
    section.show(console)
    print(section.summary())


if __name__ == "__main__":
    main()
