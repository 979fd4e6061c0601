"""Ours: the old classes' neurons are frozen, the others learn (``neusemslice.extend``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import neusemslice as nss
from bench.continual.learner import Naive, Setting
from bench.continual.problem import BATCH, TEST_BATCH, Problem, Stream

PROFILED = 2000


class Ours(Naive):
    """Extension."""

    def __init__(self, problem: Problem, base: nn.Module, setting: Setting, seed: int) -> None:
        super().__init__(problem, base, setting, seed)
        self.model = base
        self.extended: nss.maintain.TaskModel | None = None

    def prepare(self, old: Stream) -> None:
        self.old = old

    def learn(self, classes: tuple[int, ...], new: Stream) -> None:
        problem = self.problem
        images = problem.train.of(self.classes[0])[:PROFILED]
        profiled = [
            (problem.normalised(x), y)
            for x, y in zip(images.pixels.split(BATCH), images.labels.split(BATCH), strict=True)
        ]
        slicing = nss.slice(nss.profile(self.model, profiled, ("taylor",)))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            found = nss.extend(
                self.model,
                slicing,
                new,
                old=self.old,
                capacity=1 - 1 / len(problem.tasks),
                epochs=problem.epochs,
                old_epochs=problem.old_epochs,
                lr=self.setting.rate,
            )
        self.classes.append(classes)
        self.extended = found.model
        with torch.no_grad(), found.frozen.applied(found.base):
            self.before = [
                torch.cat(
                    [
                        found.base(problem.normalised(x))
                        for x in problem.test.pixels.split(TEST_BATCH)
                    ]
                )
            ]

    def logits(self, x: Tensor, task: int) -> Tensor:
        if self.extended is None:
            return self.model(x)
        return self.extended.answer(["old", "new"][task], x)


class OursReplay10(Ours):
    pass
