"""PackNet (Mallya and Lazebnik 2018, arXiv 1711.05769): a set of weights for each task.

After a task the smallest of the weights that it may change are set to 0, layer by layer, and the
rest is trained again; then these weights never change. The next task begins with the freed weights
at 0, trains them alone, and reads all weights so far. A task is answered with the weights of its
own and of earlier tasks. As published, biases and batch norms stay as the first task left them;
``PackNetNorms`` gives each task batch norms of its own, which ours has too.

Each task gets the same share of the weights, but of two the first may keep somewhat more; the last
one has what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.continual.learner import Divided, Naive
from bench.continual.problem import Problem
from bench.stream import Stream


class PackNet(Naive):
    """Trains the weights that are left."""

    settings = (
        Divided(3e-3),
        Divided(1e-2, old_rate=1e-2),
        Divided(1e-2, first=1.3),
    )
    norms_per_task = False

    def __init__(self, problem: Problem, base: nn.Module, setting: Divided, seed: int) -> None:
        super().__init__(problem, base, setting, seed)
        self.setting: Divided = setting
        self.weights = [
            m.weight for m in self.backbone.modules() if isinstance(m, (nn.Conv2d, nn.Linear))
        ]
        self.norms = [m for m in self.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        # Which task a weight belongs to; of those that are nobody's yet, the current one.
        self.owner = [torch.zeros(w.shape, dtype=torch.int64) for w in self.weights]
        self.kept_norms: list[list[dict[str, Tensor]]] = []

    def prepare(self, old: Stream) -> None:
        """Prunes what the last task owns to its share, and trains the rest again."""
        task = len(self.classes) - 1
        tasks = len(self.problem.tasks)
        kept = 1 / (tasks - task) if task else self.setting.kept(tasks)
        for weight, owner in zip(self.weights, self.owner, strict=True):
            prune(weight, owner, task, kept)
        self.mode()
        if task == 0:
            self.backbone.train()  # the first task's norms and biases have to fit what is left
        rate = self.setting.rate if task else self.setting.old_rate
        self._train(old, self.problem.old_epochs, rate, with_biases=task == 0)
        self._keep_norms(task)

    def train_on(self, new: Stream) -> None:
        task = len(self.classes) - 1
        for owner in self.owner:
            owner[owner == FREE] = task
        self.mode()
        self._train(new, self.problem.epochs, self.setting.rate, with_biases=False)
        self._keep_norms(task)

    def mode(self) -> None:
        self.backbone.eval()
        if self.norms_per_task:
            for norm in self.norms:
                norm.train()

    def _train(self, stream: Stream, epochs: int, rate: float, with_biases: bool) -> None:
        task = len(self.classes) - 1
        self.fixed = [
            (weight, owner != task, weight.detach().clone())
            for weight, owner in zip(self.weights, self.owner, strict=True)
        ]
        chosen = list(self.weights)
        weights = {id(w) for w in self.weights}
        if with_biases:
            chosen += [p for p in self.backbone.parameters() if id(p) not in weights]
        elif self.norms_per_task:
            chosen += [p for norm in self.norms for p in norm.parameters()]
        self.fit([*chosen, *self.heads[-1].parameters()], stream, epochs, rate)

    @torch.no_grad()
    def stepped(self) -> None:
        for weight, fixed, value in self.fixed:
            weight.copy_(torch.where(fixed, value, weight))

    def _keep_norms(self, task: int) -> None:
        now = [{k: v.clone() for k, v in norm.state_dict().items()} for norm in self.norms]
        self.kept_norms[task:] = [now]

    @torch.no_grad()
    def logits(self, x: Tensor, task: int) -> Tensor:
        whole = [weight.clone() for weight in self.weights]
        now = [{k: v.clone() for k, v in norm.state_dict().items()} for norm in self.norms]
        for weight, owner in zip(self.weights, self.owner, strict=True):
            weight.copy_(torch.where((owner >= 0) & (owner <= task), weight, 0))
        if task < len(self.kept_norms):
            self._set_norms(self.kept_norms[task])
        found = super().logits(x, task)
        for weight, value in zip(self.weights, whole, strict=True):
            weight.copy_(value)
        self._set_norms(now)
        return found

    def _set_norms(self, states: list[dict[str, Tensor]]) -> None:
        for norm, state in zip(self.norms, states, strict=True):
            norm.load_state_dict(state)


class PackNetNorms(PackNet):
    """With batch norms for each task."""

    norms_per_task = True


FREE = -1


@torch.no_grad()
def prune(weight: Tensor, owner: Tensor, task: int, kept: float) -> None:
    """Frees the smallest of a task's weights, in place; the given share of them is kept."""
    own = (owner == task).flatten().nonzero().squeeze(1)
    order = weight.abs().flatten()[own].sort(stable=True).indices
    freed = own[order[: len(own) - round(kept * len(own))]]
    owner.view(-1)[freed] = FREE
    weight.copy_(torch.where(owner == FREE, 0, weight))
