"""What is to be learned: images of classes that come in groups, one group after another.

A problem splits the classes of a data set into tasks. The last images of a fixed random order of
the training images are for validation only: learning rates are chosen with them, and no run trains
on them. Test images are looked at after the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench import cifar, mnist

DECAY = 1e-2
BASE_RATE = 3e-3
BATCH = 128
TEST_BATCH = 250


@dataclass(frozen=True)
class Images:
    """Images uint8 ``[N, C, H, W]``, and their classes int64 ``[N]``."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor | slice) -> Images:
        return Images(self.pixels[chosen], self.labels[chosen])

    def of(self, classes: tuple[int, ...]) -> Images:
        """Those of some classes."""
        return self[torch.isin(self.labels, torch.tensor(classes))]


@dataclass(frozen=True)
class Problem:
    """Data, a network for it, and how it is trained.

    Attributes:
        key: for files and tables.
        network: an untrained one with so many outputs.
        tasks: the classes of each task.
        train, validation, test: images of all classes.
        normalised: from uint8 to what the network takes.
        augmented: changes training images by chance, or is ``None``.
        base_epochs, epochs: of the first task, and of each other.
        old_epochs: over the old images, for methods that prepare the network with them.
        longest: batches of a pass at most.
    """

    key: str
    network: Callable[[int], nn.Module]
    tasks: tuple[tuple[int, ...], ...]
    train: Images
    validation: Images
    test: Images
    normalised: Callable[[Tensor], Tensor]
    augmented: Callable[[Tensor, torch.Generator], Tensor] | None
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
        return (
            f"{len(self.train)} images, {self.base_epochs}+{self.old_epochs}+{self.epochs} epochs"
        )

    def stream(self, images: Images, seed: int, batches: int | None = None) -> Stream:
        """Training batches; in each pass all images, or so many batches."""
        batches = batches or max(1, len(images) // BATCH)
        return Stream(self, images, seed, min(batches, self.longest or batches))

    def base(self, seed: int) -> nn.Module:
        """The network after its first task, in evaluation mode; trained once, and then kept."""
        classes = self.tasks[0]
        images = self.train.of(classes)
        settings = f"{len(images)}-{len(classes)}-{self.base_epochs}-{seed}"
        kept = cifar.CACHE / f"base-{self.key}-{settings}.safetensors"
        if not kept.exists():
            _keep(self._trained_base(images, seed), kept)
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


class Stream:
    """Shuffled, augmented batches; each pass continues the last one's random numbers."""

    def __init__(self, problem: Problem, images: Images, seed: int, batches: int) -> None:
        self.problem, self.images, self.batches = problem, images, batches
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.zeros(0, dtype=torch.int64)
        for _ in range(self.batches):
            while len(order) < BATCH:
                again = torch.randperm(len(self.images), generator=self.generator)
                order = torch.cat([order, again])
            chosen, order = self.images[order[:BATCH]], order[BATCH:]
            pixels = chosen.pixels
            if self.problem.augmented is not None:
                pixels = self.problem.augmented(pixels, self.generator)
            yield self.problem.normalised(pixels), chosen.labels


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


def cifar_problem(tasks: tuple[tuple[int, ...], ...], quick: bool = False) -> Problem:
    """CIFAR-10 as JPEGs, and ResNet-20."""
    train_images, test = cifar.load("train"), cifar.load("test")
    return _problem(
        f"cifar-{len(tasks)}",
        lambda outputs: cifar.ResNet(3, outputs).to(memory_format=torch.channels_last),
        tasks,
        Images(train_images.pixels, train_images.labels),
        Images(test.pixels, test.labels),
        cifar.normalised,
        cifar.augmented,
        (8, 3, 2),
        quick,
    )


def mnist_problem(tasks: tuple[tuple[int, ...], ...], quick: bool = False) -> Problem:
    """MNIST, and LeNet-5."""
    data = mnist.load()

    def network(outputs: int) -> nn.Module:
        model = mnist.lenet()
        model[-1] = nn.Linear(model[-1].in_features, outputs)
        return model

    return _problem(
        f"mnist-{len(tasks)}",
        network,
        tasks,
        Images((data.train_images * 255).round().byte(), data.train_labels),
        Images((data.test_images * 255).round().byte(), data.test_labels),
        lambda pixels: pixels.float() / 255,
        None,
        (2, 1, 1),
        quick,
    )


def _problem(
    key: str,
    network: Callable[[int], nn.Module],
    tasks: tuple[tuple[int, ...], ...],
    train_images: Images,
    test: Images,
    normalised: Callable[[Tensor], Tensor],
    augmented: Callable[[Tensor, torch.Generator], Tensor] | None,
    epochs: tuple[int, int, int],
    quick: bool,
) -> Problem:
    order = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))
    held = len(train_images) // 10
    seen, validation = train_images[order[:-held]], train_images[order[-held:]]
    if quick:
        seen, validation, test = seen[:2000], validation[:200], test[:500]
        epochs = (2, 1, 1)
    return Problem(key, network, tasks, seen, validation, test, normalised, augmented, *epochs)


def _keep(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, new)
    new.rename(path)
