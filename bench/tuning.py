"""Ways to tune a network to new images: ours, and those it is compared with."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neusemslice as nss
from bench import cifar
from bench.continual.deeparc import BATCHES, redundant, with_norms
from bench.stream import Stream
from neusemslice.maintain import fit
from neusemslice.optim import MaskedAdamW, row_gradients

BUDGET = 0.2
DECAY = 1e-2
DEEPARC = "redundant layers (DeepArc)"
METHODS = ("ours", "full", "last layer", "random neurons", "batch norms", "LoRA", DEEPARC)
BY_ROWS = ("ours", "random neurons")


@dataclass(frozen=True)
class Choice:
    """What a method chooses on validation images.

    Attributes:
        rate: learning rate.
        renewed: whether running statistics of batch norms follow the new images.
    """

    rate: float
    renewed: bool


@dataclass(frozen=True)
class Tuned:
    """A tuned network.

    Attributes:
        neurons: those that were tuned, of methods that tune by rows.
        parameters: how many were trained.
        state: bytes that the optimizer held.
        seconds: of training, and of what a method does before: profiles, the choice of layers.
    """

    model: nn.Module
    neurons: nss.Slice
    parameters: int
    state: int
    seconds: float


def tune(
    method: str,
    model: nn.Module,
    slicing: nss.SemanticSlicing,
    rows: nss.Slice,
    choice: Choice,
    stream: Stream,
) -> Tuned:
    """Tunes a network in place, or ours a copy, with the batches of one pass.

    Args:
        slicing: of the network as it knows the old images.
        rows: the neurons that random choice tunes, and that LoRA's rank is measured by.
    """
    begin = time.perf_counter()
    if method == "ours":
        found = nss.readapt(
            model,
            slicing,
            stream,
            BUDGET,
            validation=None,
            recalibrate=choice.renewed,
            epochs=1,
            lr=choice.rate,
            weight_decay=DECAY,
        )
        report = found.report
        return Tuned(
            found.model,
            found.tuned,
            report.tuned_parameters,
            report.training.optimizer_bytes,
            time.perf_counter() - begin,
        )
    layers = redundant_layers(model, stream) if method == DEEPARC else ()
    before = time.perf_counter() - begin
    with tuning(method, model, rows, choice.rate, layers) as (adapted, optimizer):
        trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        training = fit(
            adapted,
            stream,
            optimizer,
            1,
            what=method,
            freeze_statistics=not choice.renewed,
        )
    return Tuned(adapted, rows, trained, training.optimizer_bytes, before + training.seconds)


def redundant_layers(model: nn.Module, stream: Stream) -> list[str]:
    """DeepArc's choice, from batches of the same images."""
    few = Stream(stream.images, stream.size, BATCHES, 0, stream.prepared)
    return redundant(model, list(few))


def network(name: str) -> nn.Module:
    """The untuned network."""
    return cifar.trained(f"{name.lower().replace('-', '')}_cifar10")


@contextmanager
def tuning(
    method: str, model: nn.Module, tuned: nss.Slice, rate: float, layers: Collection[str] = ()
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """Inside the block, a model to be trained with an optimizer, as a method does; in place.

    Args:
        tuned: the neurons, of methods that tune by rows.
        layers: those that DeepArc chose.
    """
    head = model.get_submodule(tuned.graph.outputs[0])
    if method in BY_ROWS:
        groups = [*tuned.parameters(model), {"params": list(head.parameters())}]
        with row_gradients(model, groups) as rows:
            yield model, MaskedAdamW(rows.groups(), lr=rate, weight_decay=DECAY)
        return
    if method == "LoRA":
        adapted = lora(model, tuned)
        chosen = [p for p in adapted.parameters() if p.requires_grad]
    else:
        adapted = model
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        modules = {
            "full": [model],
            "last layer": [head],
            "batch norms": norms,
            DEEPARC: [*with_norms(model, layers), head],
        }[method]
        chosen = [p for module in modules for p in module.parameters()]
    yield adapted, torch.optim.AdamW(chosen, lr=rate, weight_decay=DECAY, fused=True)


def lora(model: nn.Module, tuned: nss.Slice) -> nn.Module:
    """LoRA on every layer, of the rank whose number of parameters comes closest to ours."""
    goal = parameters_of(model, tuned)
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def made(rank: int) -> nn.Module:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return peft.get_peft_model(copy.deepcopy(model), config)

    ranks = range(1, 17)
    sizes = [sum(p.numel() for p in made(r).parameters() if p.requires_grad) for r in ranks]
    return made(min(ranks, key=lambda r: abs(sizes[r - 1] - goal)))


def parameters_of(model: nn.Module, tuned: nss.Slice) -> int:
    """How many parameters are tuned with some neurons and the output layer."""
    head = model.get_submodule(tuned.graph.outputs[0])
    return sum(p.numel() for p in head.parameters()) + sum(
        p.numel() // p.shape[dim] * len(rows)
        for group in tuned.parameters(model)
        for p, dim, rows in zip(group["params"], group["neuron_dims"], group["rows"], strict=True)
    )


def some(images: cifar.Images, count: int, seed: int) -> cifar.Images:
    """Other images for another seed, as far as they go; all of them if there are no more."""
    count = min(count, len(images))
    return images[torch.arange(seed * count, (seed + 1) * count) % len(images)]


@torch.no_grad()
def right(model: nn.Module, images: cifar.Images) -> Tensor:
    """Which images a model answers rightly, bool ``[N]``."""
    model.eval()
    return torch.cat([model(x).argmax(1) == y for x, y in images.batches()])


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def random_neurons(slicing: nss.SemanticSlicing, seed: int) -> nss.Slice:
    """As many as ours, anywhere."""
    graph = slicing.profile.graph
    order = torch.randperm(graph.neurons, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(graph.neurons, dtype=torch.bool)
    mask[order[: int(BUDGET * graph.neurons)]] = True
    parts = mask.split([site.neurons for site in graph.sites])
    return nss.Slice(graph, dict(zip((s.name for s in graph.sites), parts, strict=True)))


@torch.no_grad()
def observe(model: nn.Module, profiler: nss.Profiler, x: Tensor, y: Tensor) -> None:
    with profiler.batch(y):
        model(x)
