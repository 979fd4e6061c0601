"""Ours: earlier tasks' neurons are frozen, free ones learn the next task (``neusemslice.extend``).

With ``T`` tasks each gets a T-th of the neurons of each layer that can be freed; of two the first
may keep somewhat more. The first task's are trained to stand alone with old images, for as many
steps as PackNet trains after pruning.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

import neusemslice as nss
from bench.cifar import Images
from bench.continual.learner import Divided, Naive
from bench.continual.problem import BATCH, Problem
from bench.stream import Stream
from neusemslice.maintain import TaskSet

PROFILED = 2000


class Ours(Naive):
    """Extension."""

    settings = (
        Divided(3e-3),
        Divided(1e-2, old_rate=1e-2),
        Divided(1e-2, first=1.3, fresh=False),
    )
    replay: ClassVar[float] = 0.0

    def __init__(self, problem: Problem, base: nn.Module, setting: Divided, seed: int) -> None:
        super().__init__(problem, base, setting, seed)
        self.setting: Divided = setting
        self.model = base
        self.names = ["old"]

    def prepare(self, old: Stream) -> None:
        self.old = old

    def learn(self, classes: tuple[int, ...], new: Stream) -> None:
        problem, number = self.problem, len(self.classes)
        left = len(problem.tasks) - number
        self.names.append(f"task {number}")
        first = number == 1
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            found = nss.extend(
                self.model,
                self.slicing() if first else None,
                new,
                name=self.names[-1],
                old=self.old if first or self.replay else None,
                replay=self.replay,
                capacity=1 - self.setting.kept(len(problem.tasks)) if first else None,
                reserve=1 - 1 / left,
                fresh=self.setting.fresh,
                epochs=problem.epochs,
                old_epochs=problem.old_epochs,
                lr=self.setting.rate,
                old_lr=self.setting.old_rate,
            )
        if first:
            with found.frozen.applied(found.base):
                self.before = [self.run(found.base)]
        else:
            self.before = [self.run(found.base.task(name)) for name in self.names[:-1]]
        self.model = found.model
        self.classes.append(classes)

    def slicing(self) -> nss.SemanticSlicing:
        """Of the first task's classes."""
        images = self.problem.data.train.of(self.classes[0])[:PROFILED]
        profiled = self.problem.data.batches(images, BATCH)
        return nss.slice(nss.profile(self.model, profiled, ("taylor",)))

    def run(self, model: nn.Module) -> Tensor:
        """Answers to all test images."""
        return self.outputs(model, self.problem.data.test)

    def logits(self, x: Tensor, task: int) -> Tensor:
        if isinstance(self.model, TaskSet):
            return self.model.answer(self.names[task], x)
        return self.model(x)

    def scores(self, images: Images) -> Tensor:
        return self.outputs(self.model, images)


class OursReplay10(Ours):
    """With a tenth of the old images, to tell whose an image is; with the setting of ours."""

    replay = 0.1
