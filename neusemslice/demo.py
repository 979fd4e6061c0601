"""The whole job on real data: train, profile, slice, and all three maintenance tasks.

What is printed and written was measured in this run. The model is a small residual network with
batch norms, trained from a fixed seed on handwritten digits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from neusemslice import _files
from neusemslice.data import ImageData
from neusemslice.graph import fingerprint
from neusemslice.maintain import (
    Extended,
    Readapted,
    Restructured,
    extend,
    fit,
    readapt,
    restructure,
)
from neusemslice.profiling import profile
from neusemslice.report import Outcome, plot_outcome, plot_slicing, print_outcome
from neusemslice.slicing import SemanticSlicing, slice_profile

_BATCH = 64
_PROFILED = 10_000  # samples that a profile is made of at most


class _Block(nn.Module):
    """Two convolutions and a shortcut, as in He et al., Deep Residual Learning, 2016."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class DigitNet(nn.Module):
    """A residual network of eight convolutions for images ``[N, 1, size, size]``."""

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        # Images of MNIST's size are halved at once: a demo is to be watched, not waited for.
        self.stem = nn.Conv2d(1, 32, 3, 2 if size > 16 else 1, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(_Block(32, 32, 1), _Block(32, 64, 2), _Block(64, 64, 1))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.bn(self.stem(x))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def run(data: ImageData, out: Path, console: Console | None = None) -> Outcome:
    """Runs the demo and writes artefacts and figures into ``out``."""
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]{data.name}[/]: {len(data.train_labels):,} training images, "
        f"{len(data.test_labels):,} held out"
    )
    model = _trained_model(data.train_images, data.train_labels, 10)
    trained = accuracy(model, data.test_images, data.test_labels)
    console.print(f"trained a residual network: {trained:.1%} of the held-out digits")

    observed = _loader(data.train_images[:_PROFILED], data.train_labels[:_PROFILED], shuffle=False)
    found = profile(model, observed, metrics=("avg", "var", "taylor"))
    slicing = slice_profile(found, metric="taylor", threshold=0.95)
    sizes = torch.cat(list(slicing.critical.values()), dim=1).sum(1)
    console.print(
        f"profiled {int(found.samples.sum()):,} images at {len(found.graph.sites)} sites in one "
        f"sweep; a digit needs {int(sizes.min())}-{int(sizes.max())} of {found.graph.neurons} "
        f"neurons, which form {slicing.num_components} semantic components"
    )
    small, small_accuracy, epochs = _restructure(model, slicing, data)
    console.print(f"restructured to {small.report.after.macs:,} multiply-adds")
    fitted, shift = _readapt(model, slicing, data)
    console.print(
        f"re-adapted to rotated and blurred digits in {fitted.report.training.steps} steps"
    )
    grown, growth = _extend(data)
    console.print(f"learned digits 5-9 after 0-4 in {grown.report.training.steps} steps")

    outcome = Outcome(
        data=data.name,
        trained=trained,
        restructured=small_accuracy,
        cost_before=small.report.before,
        cost_after=small.report.after,
        fine_tuning_epochs=epochs,
        **shift,
        **growth,
    )
    found.save(out / "profile.safetensors")
    slicing.save(out / "slice.safetensors")
    for name, result in (
        ("model", model),
        ("restructured", small.model),
        ("readapted", fitted.model),
        ("extended", grown.model),
    ):
        content = {"fingerprint": fingerprint(result), "class_names": list(found.class_names)}
        _files.write(out / f"{name}.safetensors", "model", result.state_dict(), content)
    (out / "outcome.json").write_text(
        json.dumps(asdict(outcome) | {"regained": outcome.regained}, indent=2) + "\n"
    )
    plot_slicing(slicing, out / "slicing.png")
    plot_outcome(outcome, out / "outcome.png")
    print_outcome(outcome, console)
    console.print(f"artefacts and figures are in [bold]{out}[/]")
    return outcome


def _restructure(
    model: nn.Module, slicing: SemanticSlicing, data: ImageData
) -> tuple[Restructured, float, int]:
    """Half the multiply-adds, then at most two epochs of fine-tuning."""
    loader = _loader(data.train_images, data.train_labels)
    small = restructure(model, slicing, calibration=loader, macs=0.5)
    epochs = 2 if len(loader) < 200 else 1
    optimizer = torch.optim.AdamW(small.model.parameters(), lr=3e-3)
    fit(small.model, loader, optimizer, epochs, what="fine-tune", freeze_statistics=False)
    return small, accuracy(small.model, data.test_images, data.test_labels), epochs


def _readapt(
    model: nn.Module, slicing: SemanticSlicing, data: ImageData
) -> tuple[Readapted, dict[str, Any]]:
    """Rotated and blurred digits, against full fine-tuning with the same steps."""
    train, test = shifted(data.train_images, seed=1), shifted(data.test_images, seed=2)
    loader = _loader(train, data.train_labels)
    epochs = _epochs(loader, steps=200)
    fitted = readapt(model, slicing, loader, budget=0.2, epochs=epochs, validation=None)
    full = DigitNet(10, data.test_images.shape[-1])
    full.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(full.parameters(), lr=3e-3)
    training = fit(full, loader, optimizer, epochs, what="full", freeze_statistics=False)
    return fitted, {
        "shifted_before": accuracy(model, test, data.test_labels),
        "shifted_after": accuracy(fitted.model, test, data.test_labels),
        "shifted_full": accuracy(full, test, data.test_labels),
        "kept_after": accuracy(fitted.model, data.test_images, data.test_labels),
        "tuned_neurons": fitted.report.tuned_neurons,
        "tuned_bytes": fitted.report.training.optimizer_bytes,
        "full_bytes": training.optimizer_bytes,
        "untuned_identical": _untuned_identical(model, fitted),
    }


def _untuned_identical(model: nn.Module, fitted: Readapted) -> bool:
    """Whether parameters and buffers differ in tuned rows and the output layer only."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = dict(fitted.model.named_parameters())
    names = {id(parameter): name for name, parameter in own.items()}
    for group in fitted.tuned.parameters(fitted.model):
        for parameter, dim, rows in zip(
            group["params"], group["neuron_dims"], group["rows"], strict=True
        ):
            tuned = parameter.detach().index_select(dim, rows)
            before[names[id(parameter)]].index_copy_(dim, rows, tuned)
    after = fitted.model.state_dict()
    return all(
        torch.equal(after[name], tensor)
        for name, tensor in before.items()
        if name.rpartition(".")[0] not in fitted.tuned.graph.outputs
    )


def _extend(data: ImageData) -> tuple[Extended, dict[str, Any]]:
    """Digits 0-4 first; their slice is made to stand alone; then 5-9, with no 0-4 among them."""
    (old_x, old_y), (new_x, new_y) = _split(data.train_images, data.train_labels)
    (old_test, old_truth), (new_test, new_truth) = _split(data.test_images, data.test_labels)
    model = _trained_model(old_x, old_y, 5)
    found = profile(model, _loader(old_x[:_PROFILED], old_y[:_PROFILED], shuffle=False))
    slicing = slice_profile(found, metric="taylor", threshold=0.95)
    loader = _loader(new_x, new_y)
    seen = _loader(old_x, old_y)
    grown = extend(
        model,
        slicing,
        loader,
        old=seen,
        capacity=0.5,
        epochs=_epochs(loader, steps=200),
        old_epochs=_epochs(seen, steps=50),
    )
    old, new = grown.model.task("old"), grown.model.task("new")
    with grown.frozen.applied(grown.base):
        before = predict(grown.base, old_test)
    return grown, {
        "old_original": accuracy(model, old_test, old_truth),
        "old_masked": accuracy(old, old_test, old_truth),
        "new": accuracy(new, new_test, new_truth - 5),
        "free_neurons": grown.report.free_neurons,
        "old_identical": torch.equal(predict(old, old_test), before),
    }


def _split(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    old = labels < 5
    return (images[old], labels[old]), (images[~old], labels[~old])


def _trained_model(images: Tensor, labels: Tensor, num_classes: int) -> DigitNet:
    torch.manual_seed(0)
    model = DigitNet(num_classes, images.shape[-1])
    loader = _loader(images, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    epochs = _epochs(loader, steps=400)
    fit(model, loader, optimizer, epochs, what="train", freeze_statistics=False)
    return model


def _loader(images: Tensor, labels: Tensor, shuffle: bool = True) -> DataLoader[tuple[Tensor, ...]]:
    # Its own generator: the order of samples does not depend on what ran before.
    return DataLoader(
        TensorDataset(images, labels),
        _BATCH,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(0),
    )


def _epochs(loader: DataLoader[tuple[Tensor, ...]], steps: int) -> int:
    """Epochs that come closest to so many steps."""
    return max(1, round(steps / len(loader)))


def shifted(images: Tensor, seed: int) -> Tensor:
    """Each image rotated by 15 to 40 degrees and blurred with a 3 × 3 binomial kernel."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.deg2rad(15 + 25 * torch.rand(len(images), generator=generator))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    rotated = F.grid_sample(images, grid, align_corners=False)
    row = torch.tensor([0.25, 0.5, 0.25])
    return F.conv2d(rotated, (row[:, None] * row).view(1, 1, 3, 3), padding=1)


def _batches_of(images: Tensor) -> Iterator[Tensor]:
    yield from images.split(256)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in evaluation mode."""
    was_training = model.training
    model.eval()
    logits = torch.cat([model(part) for part in _batches_of(images)])
    model.train(was_training)
    return logits


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit is the label's."""
    return float((predict(model, images).argmax(1) == labels).float().mean())
