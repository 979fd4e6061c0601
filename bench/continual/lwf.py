"""Learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282).

The network before the new task answers the new images with its old heads; while all weights are
trained on the new classes, the old heads are held to those answers by the distillation loss with
temperature 2 and weight 1 (their equations 2–4, λ_o = 1). As they do, the new head is trained
alone first, here for a quarter of the steps.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.continual.learner import Naive
from bench.continual.problem import local
from bench.stream import Stream

TEMPERATURE = 2.0
WARM_UP = 0.25


class LwF(Naive):
    """Naive retraining with distillation from the network before."""

    def train_on(self, new: Stream) -> None:
        self.teacher = copy.deepcopy(self.backbone).eval()
        self.old_heads = copy.deepcopy(self.heads[:-1])
        head = list(self.heads[-1].parameters())
        steps = self.problem.epochs * len(new)
        warm = round(WARM_UP * steps)
        self.joint = False
        self.backbone.eval()
        images = new.images
        self.fit(head, self.problem.stream(images, self.seed, max(1, warm)), 1)
        self.joint = True
        self.backbone.train()
        everything = [*self.trained(), *(p for h in self.heads for p in h.parameters())]
        self.fit(everything, self.problem.stream(images, self.seed + 1, steps - warm), 1)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.backbone(x)
        total = F.cross_entropy(self.heads[-1](features), local(y, self.classes[-1]))
        if self.joint:
            with torch.no_grad():
                remembered = self.teacher(x)
            for head, old_head in zip(self.heads[:-1], self.old_heads, strict=True):
                total = total + distillation(head(features), old_head(remembered).detach())
        return total


def distillation(given: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy between two answers, both softened by the temperature."""
    soft = (wanted / TEMPERATURE).softmax(1)
    return -(soft * (given / TEMPERATURE).log_softmax(1)).sum(1).mean()
