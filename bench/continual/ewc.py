"""Elastic weight consolidation (Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114).

After a task the diagonal of the Fisher information is estimated,
``F_i = E[(∂ log p(y|x) / ∂θ_i)²]`` with ``y`` drawn from the network's own answer; on the next task
``½ λ Σ_i F_i (θ_i − θ*_i)²`` is added to the loss, one such term for each task so far (their
equation 3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.continual.learner import Naive, Setting
from bench.continual.problem import Problem
from bench.stream import Stream

SAMPLES = 512


class EWC(Naive):
    """Naive retraining with the penalty."""

    settings = tuple(Setting(3e-3, strength) for strength in (1e2, 1e3, 1e4))

    def __init__(self, problem: Problem, base: nn.Module, setting: Setting, seed: int) -> None:
        super().__init__(problem, base, setting, seed)
        self.anchors: list[tuple[list[Tensor], list[Tensor]]] = []

    def prepare(self, old: Stream) -> None:
        parameters = list(self.backbone.parameters())
        fisher = [torch.zeros_like(p) for p in parameters]
        generator = torch.Generator().manual_seed(self.seed)
        seen = 0
        self.backbone.eval()
        for x, _ in old:
            for sample in x[: SAMPLES - seen].split(1):
                logits = self.heads[-1](self.backbone(sample))
                drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)
                chosen = logits.log_softmax(1)[0, drawn.item()]
                for total, gradient in zip(
                    fisher, torch.autograd.grad(chosen, parameters), strict=True
                ):
                    total.addcmul_(gradient, gradient, value=1 / SAMPLES)
                seen += 1
            if seen == SAMPLES:
                break
        self.anchors.append((fisher, [p.detach().clone() for p in parameters]))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) + self.setting.strength / 2 * self.penalty()

    def penalty(self) -> Tensor:
        """``Σ F (θ − θ*)²`` over tasks and parameters."""
        total = torch.zeros(())
        for fisher, anchor in self.anchors:
            for p, f, a in zip(self.backbone.parameters(), fisher, anchor, strict=True):
                total = total + (f * (p - a) ** 2).sum()
        return total
