"""The plainest learner, from which the others differ in a few lines each.

A network learns its tasks one after another and has a head for each; between them it may prepare
for what comes with the images of the last task. Naive retraining trains every weight on the new
classes and does nothing about the old ones. Head only trains the new head alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cifar import Images
from bench.continual.problem import TEST_BATCH, Problem, local, train
from bench.stream import Stream


@dataclass(frozen=True)
class Setting:
    """What a method chooses on validation images.

    Attributes:
        rate: learning rate.
        strength: of a penalty, where the method has one.
    """

    rate: float
    strength: float = 0.0

    def shown(self, tasks: int) -> str:
        """As tables have it, of problems of so many tasks."""
        return f"{self.rate:g}" + (f", penalty {self.strength:g}" if self.strength else "")


@dataclass(frozen=True)
class Divided(Setting):
    """What is chosen by a method that gives each task a part of the network.

    Attributes:
        old_rate: learning rate with which the first task's part is trained to do alone.
        first: what the first of two tasks keeps, in equal shares.
        fresh: whether what is free starts anew.
    """

    old_rate: float = 3e-3
    first: float = 1.0
    fresh: bool = True

    def shown(self, tasks: int) -> str:
        parts = [super().shown(tasks)]
        if self.old_rate != self.rate:
            parts.append(f"old {self.old_rate:g}")
        if self.kept(tasks) != 1 / tasks:
            parts.append(f"the first keeps {self.kept(tasks):.0%}")
        if not self.fresh:
            parts.append("free ones keep weights")
        return ", ".join(parts)

    def kept(self, tasks: int) -> float:
        """Share of the network that the first of so many tasks keeps: equal, but for two."""
        return (self.first if tasks == 2 else 1.0) / tasks


RATES = tuple(Setting(rate) for rate in (1e-3, 3e-3, 1e-2))
"""What is tried by methods without a strength; the others try as many."""


class Naive:
    """Trains every weight on the new classes.

    Args:
        base: the network after the first task; it is left as it was. Its last layer is the head.
    """

    settings = RATES

    def __init__(self, problem: Problem, base: nn.Module, setting: Setting, seed: int) -> None:
        self.problem, self.setting, self.seed = problem, setting, seed
        self.classes = [problem.tasks[0]]
        self.backbone = copy.deepcopy(base)
        name = [n for n, m in self.backbone.named_modules() if isinstance(m, nn.Linear)][-1]
        head = self.backbone.get_submodule(name)
        assert isinstance(head, nn.Linear)
        self.width = head.in_features
        self.heads = [head]
        self.backbone.set_submodule(name, nn.Identity())

    def prepare(self, old: Stream) -> None:
        """For the next task, with images of the last one."""

    def learn(self, classes: tuple[int, ...], new: Stream) -> None:
        """The next task. ``before``: the logits of each earlier one for the test images."""
        images = self.problem.data.test
        self.before = [self.answers(images, task) for task in range(len(self.classes))]
        self.add_head(classes)
        self.train_on(new)

    def train_on(self, new: Stream) -> None:
        self.mode()
        parameters = [*self.trained(), *self.heads[-1].parameters()]
        self.fit(parameters, new, self.problem.epochs)

    def add_head(self, classes: tuple[int, ...]) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.heads.append(nn.Linear(self.width, len(classes)))
        self.classes.append(classes)

    def fit(
        self,
        parameters: list[nn.Parameter],
        stream: Stream,
        epochs: int,
        rate: float | None = None,
    ) -> None:
        """Trains, with the setting's rate if none is given."""
        model = nn.ModuleList([self.backbone, *self.heads])
        rate = self.setting.rate if rate is None else rate
        train(model, parameters, stream, epochs, rate, self.loss, self.stepped)
        self.backbone.eval()

    def mode(self) -> None:
        """Puts the backbone into the mode in which it is trained."""
        self.backbone.train()

    def trained(self) -> list[nn.Parameter]:
        """What of the backbone is trained on a new task."""
        return list(self.backbone.parameters())

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Of a batch of the last task."""
        return F.cross_entropy(self.heads[-1](self.backbone(x)), local(y, self.classes[-1]))

    def stepped(self) -> None:
        """After each step."""

    def answers(self, images: Images, task: int) -> Tensor:
        """A task's logits ``[N, classes of the task]`` for any images."""
        return self.outputs(lambda x: self.logits(x, task), images)

    @torch.no_grad()
    def outputs(self, model: Callable[[Tensor], Tensor], images: Images) -> Tensor:
        """What a model says, batch by batch."""
        return torch.cat([model(x) for x, _ in self.problem.data.batches(images, TEST_BATCH)])

    def logits(self, x: Tensor, task: int) -> Tensor:
        """A task's logits of one batch."""
        return self.heads[task](self.backbone(x))

    def scores(self, images: Images) -> Tensor:
        """``[N, K]`` over the classes of all tasks, in their order."""
        return torch.cat([self.answers(images, task) for task in range(len(self.classes))], 1)


class HeadOnly(Naive):
    """Trains the new head alone."""

    def mode(self) -> None:
        self.backbone.eval()

    def trained(self) -> list[nn.Parameter]:
        return []
