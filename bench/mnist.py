"""MNIST and a small convolutional network trained on it, for benchmarks and tests on real data.

The images lie outside the package, in ``../shared/data``; what needs them skips where they are
absent. The network is trained once, from a fixed seed, and then kept.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from bench.cifar import CACHE, DATA
from neusemslice.data import ImageData, load_mnist

FOLDER = DATA / "mnist"


def missing() -> str | None:
    """Why the data cannot be used here; None if it can."""
    return None if FOLDER.is_dir() else f"there is no {FOLDER.name} in {DATA.parent.name}/data"


@cache
def load() -> ImageData:
    """All images.

    Raises:
        FileNotFoundError: if the data is absent.
    """
    return load_mnist(FOLDER)


def lenet() -> nn.Sequential:
    """LeNet-5 with ReLU and maximum pools (LeCun et al. 1998), for 28 × 28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def trained(epochs: int = 3) -> nn.Sequential:
    """The network in evaluation mode: 98.6 % of the test images."""
    kept = CACHE / f"lenet-mnist-{epochs}.safetensors"
    model = lenet()
    if not kept.exists():
        data = load()
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = lenet()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for part in torch.randperm(len(data.train_labels), generator=generator).split(128):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(data.train_images[part]), data.train_labels[part])
                loss.backward()
                optimizer.step()
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), kept.with_suffix(".new"))
        kept.with_suffix(".new").rename(kept)
    model.load_state_dict(load_file(kept))
    return model.eval()
