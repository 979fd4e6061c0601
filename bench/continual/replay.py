"""Replay: some images of the old classes are seen again among the new ones.

Experience replay (Ratcliff 1990; Chaudhry et al. 2019, "On tiny episodic memories in continual
learning"): a fixed share of the old training images is mixed with the new ones, all weights are
trained with cross-entropy over all classes seen so far. The steps are those of the other methods.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cifar import Images
from bench.continual.learner import Naive
from bench.continual.problem import local
from bench.stream import Stream


class Replay(Naive):
    """Naive retraining with replay."""

    share: ClassVar[float]

    def train_on(self, new: Stream) -> None:
        old, images = sum(self.classes[:-1], ()), self.problem.data.train
        pool = with_replay(images, old, self.classes[-1], self.share, self.seed)
        super().train_on(self.problem.stream(pool, self.seed, len(new)))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.backbone(x)
        logits = torch.cat([head(features) for head in self.heads], 1)
        return F.cross_entropy(logits, local(y, sum(self.classes, ())))


class Replay5(Replay):
    share = 0.05


class Replay10(Replay):
    share = 0.1


class Replay100(Replay):
    share = 1.0


def with_replay(
    images: Images,
    old: tuple[int, ...],
    new: tuple[int, ...],
    share: float,
    seed: int,
) -> Images:
    """The new classes' images and a random share of the old ones'."""
    before = images.of(old)
    order = torch.randperm(len(before), generator=torch.Generator().manual_seed(seed))
    chosen = before[order[: round(share * len(before))]]
    fresh = images.of(new)
    return Images(
        torch.cat([fresh.pixels, chosen.pixels]), torch.cat([fresh.labels, chosen.labels])
    )
