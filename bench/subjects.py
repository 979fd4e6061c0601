"""The models, images and profiles of studies, and what of a study was already measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import neusemslice as nss
from bench import cifar, mnist
from neusemslice import _files
from neusemslice.graph import evaluation

METRICS = ("avg", "var", "taylor", "deeplift")
BATCH = 125
TEST_BATCH = 25
"""Small enough for the second-level cache: twice as fast as larger ones."""

Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Subject:
    """A trained model and the images to profile and to test it with.

    Attributes:
        name: for tables.
        key: for files.
        model: in evaluation mode.
        classes: their names.
        train: inputs of the images with these indices, and their labels.
        train_images: how many there are.
        test: batches of images that the model was not trained on.
    """

    name: str
    key: str
    model: nn.Module
    classes: tuple[str, ...]
    train: Callable[[Tensor], tuple[Tensor, Tensor]]
    train_images: int
    test: Batches

    @property
    def labels(self) -> Tensor:
        """Of the test images."""
        return torch.cat([y for _, y in self.test])

    def subset(self, part: int, images: int) -> Batches:
        """Random training images in batches; two parts have none in common."""
        order = torch.randperm(self.train_images, generator=torch.Generator().manual_seed(0))
        x, y = self.train(order[part * images : (part + 1) * images])
        return list(zip(x.split(BATCH), y.split(BATCH), strict=True))

    def profile(self, part: int, images: int, metrics: tuple[str, ...] = METRICS) -> nss.Profile:
        """Of a part of the training images; kept in a file, and continued after an interrupt."""
        stem = f"profile-{_files.FORMAT}-{self.key}-{images}-{part}-{'-'.join(metrics)}"
        path = cifar.CACHE / f"{stem}.safetensors"
        if not path.exists():
            nss.profile(
                self.model,
                self.subset(part, images),
                metrics,
                class_names=self.classes,
                baseline="mean",
                checkpoint=cifar.CACHE / f"{stem}.part",
            ).save(path)
        return nss.Profile.load(path)

    def of_class(self, number: int) -> Subject:
        """The same with one class's test images."""
        own = [(x[y == number], y[y == number]) for x, y in self.test]
        batches = [(x, y) for x, y in own if len(y)]
        return replace(self, key=f"{self.key}-{number}", test=batches)

    def right(self, kept: nss.Slice) -> Tensor:
        """Which test images the model answers rightly with a slice alone, bool ``[N]``."""
        with evaluation(self.model), torch.no_grad(), kept.applied(self.model):
            return torch.cat([self.model(x).argmax(1) == y for x, y in self.test])


def cifar_subject(images: int) -> Subject:
    """ResNet-20 with the last so many CIFAR-10 test images: methods were chosen by the first."""
    train, test = cifar.load("train"), cifar.load("test")[-images:]
    return Subject(
        "ResNet-20, CIFAR-10",
        "cifar",
        cifar.trained("resnet20_cifar10_jpeg").to(memory_format=torch.channels_last),
        cifar.CLASSES,
        lambda chosen: (train[chosen].inputs(), train.labels[chosen]),
        len(train),
        [(x.contiguous(memory_format=torch.channels_last), y) for x, y in test.batches(TEST_BATCH)],
    )


def mnist_subject(images: int) -> Subject:
    """LeNet-5 with as many MNIST test images."""
    data = mnist.load()
    x, y = data.test_images[:images], data.test_labels[:images]
    return Subject(
        "LeNet-5, MNIST",
        "mnist",
        mnist.trained(),
        tuple(str(digit) for digit in range(10)),
        lambda chosen: (data.train_images[chosen], data.train_labels[chosen]),
        len(data.train_labels),
        list(zip(x.split(TEST_BATCH), y.split(TEST_BATCH), strict=True)),
    )


class Answers:
    """Which images each slice answered rightly, kept in a file: a study continues from it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, subject: Subject, kept: nss.Slice) -> Tensor:
        """bool ``[N]``, measured unless it was before."""
        key = f"{subject.key}/{len(subject.labels)}/{kept.digest}"
        if key not in self._found:
            right = subject.right(kept)
            self._found[key] = "".join("1" if hit else "0" for hit in right.tolist())
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(self._found))
            new.rename(self._path)
        return torch.tensor([hit == "1" for hit in self._found[key]])
