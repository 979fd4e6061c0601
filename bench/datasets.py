"""Images that networks are trained, judged and tested with.

The last images of a fixed random order of the training images are for validation only: settings are
chosen with them, and no run trains on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import cifar, mnist
from bench.cifar import Images
from neusemslice.data import load_digits


@dataclass(frozen=True)
class Data:
    """One data set.

    Attributes:
        name: for tables.
        classes: their names.
        white: the largest value of a pixel.
        train, validation, test: images of all classes.
        normalised: from uint8 to what a network takes.
        prepared: the same for training, where images may be changed by chance.
    """

    name: str
    classes: tuple[str, ...]
    white: int
    train: Images
    validation: Images
    test: Images
    normalised: Callable[[Tensor], Tensor]
    prepared: Callable[[Tensor, torch.Generator], Tensor]

    def batches(self, images: Images, size: int) -> list[tuple[Tensor, Tensor]]:
        """What a network takes, and labels; in order, the last one may be smaller."""
        parts = zip(images.pixels.split(size), images.labels.split(size), strict=True)
        return [(self.normalised(pixels), labels) for pixels, labels in parts]


def cifar10() -> Data:
    """CIFAR-10 as JPEGs; ``bench.cifar.missing`` says whether it is here."""
    train, validation = _parts(cifar.load("train"))
    return Data(
        "CIFAR-10",
        cifar.CLASSES,
        255,
        train,
        validation,
        cifar.load("test"),
        cifar.normalised,
        cifar.prepared,
    )


def mnist_digits() -> Data:
    """MNIST; ``bench.mnist.missing`` says whether it is here."""
    data = mnist.load()
    return _digits(
        "MNIST",
        255,
        Images((data.train_images * 255).round().byte(), data.train_labels),
        Images((data.test_images * 255).round().byte(), data.test_labels),
    )


def small_digits() -> Data:
    """Scikit-learn's scans of 8 × 8, which are always here."""
    data = load_digits()
    return _digits(
        "digits",
        16,
        Images((data.train_images * 16).byte(), data.train_labels),
        Images((data.test_images * 16).byte(), data.test_labels),
    )


def _digits(name: str, white: int, train: Images, test: Images) -> Data:
    def normalised(pixels: Tensor) -> Tensor:
        return pixels.float() / white

    return Data(
        name,
        tuple(str(digit) for digit in range(10)),
        white,
        *_parts(train),
        test,
        normalised,
        lambda pixels, _: normalised(pixels),
    )


def _parts(images: Images) -> tuple[Images, Images]:
    """For training, and for validation."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held = len(images) // 10
    return images[order[:-held]], images[order[-held:]]
