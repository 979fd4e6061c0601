"""What is to be learned: images of classes that come in groups, one group after another.

A problem splits the classes of a data set into tasks. Settings are chosen with validation images.
Test images are looked at after the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench import cifar, datasets, mnist
from bench.cifar import Images
from bench.datasets import Data
from bench.mixed import mixed
from bench.stream import Stream

DECAY = 1e-2
BASE_RATE = 3e-3
BATCH = 128
TEST_BATCH = 250


@dataclass(frozen=True)
class Problem:
    """Data, a network for it, and how it is trained.

    Attributes:
        key: for files and tables.
        data: images of all classes.
        network: an untrained one with so many outputs.
        tasks: the classes of each task.
        base_epochs, epochs: of the first task, and of each other.
        old_epochs: over the old images, for methods that prepare the network with them.
        longest: batches of a pass at most.
    """

    key: str
    data: Data
    network: Callable[[int], nn.Module]
    tasks: tuple[tuple[int, ...], ...]
    base_epochs: int
    epochs: int
    old_epochs: int
    longest: int | None = None

    @property
    def classes(self) -> tuple[int, ...]:
        """Of all tasks, in their order."""
        return tuple(k for task in self.tasks for k in task)

    @property
    def settings(self) -> str:
        """What runs depend on, for keys of kept results."""
        epochs = f"{self.base_epochs}+{self.old_epochs}+{self.epochs}"
        return (
            f"{len(self.data.train)} images, {epochs} epochs, batches of {BATCH}, decay {DECAY:g}"
        )

    def short(self, steps: int) -> Problem:
        """One pass of so many batches a task, judged by images that are not the test's."""
        data = replace(self.data, test=self.data.validation)
        return replace(self, data=data, epochs=1, old_epochs=1, longest=steps)

    def stream(self, images: Images, seed: int, batches: int | None = None) -> Stream:
        """Training batches; in each pass all images, or so many batches."""
        batches = batches or max(1, len(images) // BATCH)
        batches = min(batches, self.longest or batches)
        return Stream(images, BATCH, batches, seed, self.data.prepared)

    def base(self, seed: int) -> nn.Module:
        """The network after its first task, in evaluation mode; trained once, and then kept."""
        classes = self.tasks[0]
        images = self.data.train.of(classes)
        settings = f"{len(images)}-{self.base_epochs}-{BATCH}-{BASE_RATE:g}-{DECAY:g}-{seed}"
        kept = cifar.CACHE / f"base-{self.key}-{settings}.safetensors"
        if not kept.exists():
            keep(self._trained_base(images, seed), kept)
        model = self.network(len(classes))
        model.load_state_dict(load_file(kept))
        return model.eval()

    def _trained_base(self, images: Images, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.network(len(self.tasks[0]))
        stream = self.stream(images, seed)
        train(
            model.train(),
            list(model.parameters()),
            stream,
            self.base_epochs,
            BASE_RATE,
            lambda x, y: F.cross_entropy(model(x), local(y, self.tasks[0])),
        )
        return model


def local(labels: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Class numbers as places in ``classes``."""
    places = torch.full((max(classes) + 1,), -1)
    places[list(classes)] = torch.arange(len(classes))
    return places[labels]


def train(
    model: nn.Module,
    parameters: list[nn.Parameter],
    stream: Stream,
    epochs: int,
    rate: float,
    loss: Callable[[Tensor, Tensor], Tensor],
    stepped: Callable[[], None] = lambda: None,
) -> None:
    """Trains some parameters with AdamW, whose learning rate falls linearly to 0.

    All methods train by this rule; it is that of ``neusemslice.maintain.fit``.

    Args:
        model: in the mode in which it is to be trained.
        loss: of a batch.
        stepped: called after each step.
    """
    wanted = {id(parameter) for parameter in parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=DECAY, fused=True)
    total = epochs * len(stream)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / total)
    for _ in range(epochs):
        for x, y in stream:
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
            scheduler.step()
            stepped()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None


def halves(classes: int) -> tuple[tuple[int, ...], ...]:
    """The first half of the classes, then the other."""
    return tuple(range(classes // 2)), tuple(range(classes // 2, classes))


def pairs(classes: int) -> tuple[tuple[int, ...], ...]:
    """Two classes at a time."""
    return tuple((k, k + 1) for k in range(0, classes, 2))


def cifar_problem(tasks: tuple[tuple[int, ...], ...]) -> Problem:
    """CIFAR-10 as JPEGs, and ResNet-20, trained in mixed precision."""
    return Problem(
        f"cifar-{len(tasks)}",
        datasets.cifar10(),
        lambda outputs: mixed(cifar.ResNet(3, outputs)),
        tasks,
        base_epochs=8,
        epochs=3,
        old_epochs=2,
    )


def mnist_problem(tasks: tuple[tuple[int, ...], ...], quick: bool = False) -> Problem:
    """MNIST, or some of its images, and LeNet-5."""

    def network(outputs: int) -> nn.Module:
        model = mnist.lenet()
        model[-1] = nn.Linear(model[-1].in_features, outputs)
        return model

    data = datasets.mnist_digits()
    if quick:
        train, validation, test = data.train[:2000], data.validation[:200], data.test[:500]
        data = replace(data, train=train, validation=validation, test=test)
    return Problem(
        f"mnist-{len(tasks)}", data, network, tasks, base_epochs=2, epochs=1, old_epochs=1
    )


def digits_problem(tasks: tuple[tuple[int, ...], ...]) -> Problem:
    """Scikit-learn's digits, and a network of two convolutions."""

    def network(outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 10, 3),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(160, outputs),
        )

    data = datasets.small_digits()
    return Problem(
        f"digits-{len(tasks)}", data, network, tasks, base_epochs=3, epochs=2, old_epochs=1
    )


def keep(model: nn.Module, path: Path) -> None:
    """Writes a network's tensors to a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, new)
    new.rename(path)
