"""The networks of the study, trained from fixed seeds.

AdamW, batches of 128, a learning rate that falls linearly to 0; those of CIFAR-10 in mixed
precision (bfloat16), on images mirrored and moved by chance. Each is trained when it is first asked
for, and then kept under ``build``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bench import cifar, datasets, mnist
from bench.continual.problem import BATCH, keep, train
from bench.datasets import Data
from bench.mixed import mixed
from bench.stream import Stream


@dataclass(frozen=True)
class Network:
    """An untrained network, and how it is trained.

    Attributes:
        name: for tables and files.
        data: what it is trained on.
        missing: why that cannot be used here; ``None`` if it can.
        make: of the standard initialisation.
        epochs: over the training images.
        rate: learning rate at the beginning.
        mixed: whether it is trained in mixed precision.
    """

    name: str
    data: Callable[[], Data]
    missing: Callable[[], str | None]
    make: Callable[[], nn.Module]
    epochs: int
    rate: float = 3e-3
    mixed: bool = False

    def trained(self, seed: int) -> nn.Module:
        """In evaluation mode."""
        stem = f"study-{self.name}-{self.epochs}-{BATCH}-{self.rate:g}-{seed}"
        kept = cifar.CACHE / f"{stem}.safetensors"
        if not kept.exists():
            keep(self._train(seed), kept)
        model = self.make()
        model.load_state_dict(load_file(kept))
        return model.eval()

    def _train(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make().train()
            model = mixed(model) if self.mixed else model
            data = self.data()
            batches = max(1, len(data.train) // BATCH)
            stream = Stream(data.train, BATCH, batches, seed, data.prepared)
            train(
                model,
                list(model.parameters()),
                stream,
                self.epochs,
                self.rate,
                lambda x, y: F.cross_entropy(model(x), y),
            )
        return model


def digits_net() -> nn.Module:
    """Two convolutions and a hidden layer, for images of 8 × 8."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def mlp() -> nn.Module:
    """Two hidden layers, for images of 28 × 28."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def resnet20() -> nn.Module:
    """He et al. 2016, option A."""
    return cifar.ResNet(3).to(memory_format=torch.channels_last)


def vgg11() -> nn.Module:
    """Configuration A of Simonyan and Zisserman 2015 with batch norms and half of its channels, for
    images of 32 × 32: one linear layer behind the last pool."""
    stages: tuple[tuple[int, ...], ...] = ((32,), (64,), (128, 128), (256, 256), (256, 256))
    widths = list(itertools.chain((3,), *stages))
    pairs = iter(itertools.pairwise(widths))
    layers: list[nn.Module] = []
    for stage in stages:
        for _ in stage:
            inputs, outputs = next(pairs)
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
    return model.to(memory_format=torch.channels_last)


def vit() -> nn.Module:
    """A small vision transformer (Dosovitskiy et al. 2021): 64 patches, 4 blocks, width 96."""
    from transformers import ViTConfig, ViTForImageClassification

    class Logits(ViTForImageClassification):  # type: ignore[misc]
        """Gives the logits alone."""

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = super().forward(pixel_values=x).logits
            return logits

    return Logits(
        ViTConfig(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=288,
            image_size=32,
            patch_size=4,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def never() -> None:
    """What is always here."""


DIGITS = Network("digits", datasets.small_digits, never, digits_net, epochs=20)
NETWORKS = (
    Network("MLP, MNIST", datasets.mnist_digits, mnist.missing, mlp, epochs=3),
    Network("LeNet-5, MNIST", datasets.mnist_digits, mnist.missing, mnist.lenet, epochs=3),
    Network(
        "ResNet-20, CIFAR-10", datasets.cifar10, cifar.missing, resnet20, epochs=10, mixed=True
    ),
    Network(
        "half VGG-11-BN, CIFAR-10", datasets.cifar10, cifar.missing, vgg11, epochs=10, mixed=True
    ),
    Network("ViT, CIFAR-10", datasets.cifar10, cifar.missing, vit, epochs=6, rate=1e-3, mixed=True),
)
