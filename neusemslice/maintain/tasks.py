"""A model that has learned several tasks: one backbone, and for each task what is its own.

A task's own are a slice, a head, and a copy of each batch norm: affine parameters and running
statistics are few, and other classes have other ones. While a task is answered its head and norms
stand in the backbone's places and all neurons outside its slice are masked, by selection. So what
later tasks train cannot change an earlier answer: their neurons are masked, and their heads and
norms are others. The slice of a task holds the neurons of all tasks before it, which it reads.

Which task a sample is of is told from the answers: by their free energy ``log Σ exp`` over the
task's logits (Liu et al., Energy-based Out-of-distribution Detection, 2020), in standard deviations
from its mean over the task's own samples. Heads that were trained apart have logits of different
scales, so the raw energy would prefer one task to another. Where a task's own samples were not at
hand, entropy takes the energy's place, which is right less often. A task that was learned with
replay adds the log-odds of its classes against its output "none of mine".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from neusemslice.graph import Graph, device_of, evaluation, logits_of
from neusemslice.profiling import batches
from neusemslice.slicing import Slice

NOBODY = -1
"""Stands for the class of an output that no class belongs to."""

_WEIGHT = 4.0
"""Of a standard deviation of energy, beside log-odds: few replayed samples make these too sure."""

_ENERGY_SAMPLES = 2048
"""So many labelled samples, if there are as many, tell a task's energy."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: of the task.
        classes: global class number of each of its outputs; ``NOBODY`` for one that stands for
            none.
        slice: the neurons that answer it; all others are masked.
        class_names: of its outputs.
        rejects: whether its head has one output more, for samples of earlier tasks.
        energy: mean and standard deviation of its energy over its own samples, if they are known.
    """

    name: str
    classes: tuple[int, ...]
    slice: Slice
    class_names: tuple[str, ...]
    rejects: bool = False
    energy: tuple[float, float] | None = None


class TaskSet(nn.Module):
    """A backbone that answers several tasks.

    ``tasks.task(name)(x)`` gives one task's logits, under its slice and with its head and norms.
    ``tasks(x)`` gives log-probabilities ``[N, K]`` over all classes by their global numbers: of the
    task, and of the class within it. A class that no task knows has ``-inf``.

    Modules with buffers stay in evaluation mode whatever ``train()`` says, so that an answer never
    changes a running statistic.

    Args:
        backbone: the model that the slices belong to; its own head and norms are the first task's.
        head: name of the backbone's output layer.
        tasks: in the order in which they were learned.
        heads: a head for each further task, by name; it reads what the backbone's head reads.
        norms: for each further task, by name, the modules that stand in for the backbone's batch
            norms, by their names.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: str,
        tasks: Sequence[Task],
        heads: Mapping[str, nn.Module],
        norms: Mapping[str, Mapping[str, nn.Module]],
    ) -> None:
        super().__init__()
        for task in tasks:
            task.slice.check_model(backbone)
        self.backbone = backbone
        self.head = head
        self.tasks: dict[str, Task] = {}
        self.heads = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        for task in tasks:
            self.add(task, heads.get(task.name), norms.get(task.name, {}))

    def add(self, task: Task, head: nn.Module | None, norms: Mapping[str, nn.Module]) -> None:
        """Adds a task; see the class's arguments."""
        self.tasks[task.name] = task
        if head is not None:
            self.heads[_key(task.name)] = head
        own = {_key(name): norm for name, norm in norms.items()}
        self.norms[_key(task.name)] = nn.ModuleDict(own)

    @property
    def graph(self) -> Graph:
        """The backbone's."""
        return next(iter(self.tasks.values())).slice.graph

    @property
    def free(self) -> Slice:
        """The neurons that no task has."""
        used = [task.slice for task in self.tasks.values()]
        return ~used[0] if len(used) == 1 else ~_union(used)

    @property
    def classes(self) -> tuple[int, ...]:
        """Global numbers of all classes, task by task."""
        return tuple(k for task in self.tasks.values() for k in task.classes if k != NOBODY)

    def task(self, name: str) -> TaskView:
        """The module that answers one task.

        Raises:
            KeyError: naming the tasks that there are.
        """
        if name not in self.tasks:
            raise KeyError(f"no task {name!r}; there are {list(self.tasks)}")
        return TaskView(self, name)

    def train(self, mode: bool = True) -> TaskSet:
        super().train(mode)
        for module in self.modules():
            if any(True for _ in module.buffers(recurse=False)):
                module.training = False
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Log-probabilities over all classes by their global numbers, ``[N, K]``."""
        outputs = {name: self.outputs(name, *args, **kwargs) for name in self.tasks}
        log_shares = self._log_shares(outputs)
        total = 1 + max(self.classes)
        found = log_shares.new_full((*log_shares.shape[1:], total), -torch.inf)
        for log_share, (name, output) in zip(log_shares, outputs.items(), strict=True):
            classes = [k for k in self.tasks[name].classes if k != NOBODY]
            own = torch.tensor(classes, device=output.device)
            within = self._known(name, output).log_softmax(-1)
            found = found.index_copy(-1, own, log_share.unsqueeze(-1) + within)
        return found

    def choose(self, *args: Any, **kwargs: Any) -> Tensor:
        """Which task each sample is of: int64 ``[N]``, counted in the order of ``tasks``."""
        outputs = {name: self.outputs(name, *args, **kwargs) for name in self.tasks}
        return self._log_shares(outputs).argmax(0)

    def answer(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """One task's logits, ``[N, classes of the task]``."""
        found = self.outputs(name, *args, **kwargs)
        return found[..., : len(self.tasks[name].classes)] if self.tasks[name].rejects else found

    def outputs(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """All outputs of one task's head: where it rejects, the last is "none of mine"."""
        with self.with_parts(name) as model, self.tasks[name].slice.masking(model):
            return logits_of(model(*args, **kwargs))

    def energy(self, name: str, outputs: Tensor) -> Tensor:
        """Free energy of a task's outputs over its classes, ``[N]``."""
        return self._known(name, outputs).logsumexp(-1)

    def _known(self, name: str, outputs: Tensor) -> Tensor:
        """The outputs that stand for a class."""
        classes = self.tasks[name].classes
        return outputs[..., [i for i, k in enumerate(classes) if k != NOBODY]].float()

    def _log_shares(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Log-probability of each task, ``[T, N]``."""
        scores = []
        known = all(task.energy is not None for task in self.tasks.values())
        for name, output in outputs.items():
            task, energy = self.tasks[name], self.energy(name, output)
            if known and task.energy is not None:
                mean, deviation = task.energy
                score = (energy - mean) / deviation
            else:
                log_p = self._known(name, output).log_softmax(-1)
                score = (log_p.exp() * log_p).sum(-1)
            odds = energy - output[..., -1].float() if task.rejects else 0.0
            scores.append(_WEIGHT * score + odds)
        return torch.stack(scores).log_softmax(0)

    def parts(self, name: str) -> dict[str, nn.Module]:
        """What is a task's own, by the backbone's names: a head and norms; the first's is none."""
        own = {_name(key): norm for key, norm in self.norms[_key(name)].named_children()}
        if _key(name) in self.heads:
            own[self.head] = self.heads[_key(name)]
        return own

    @contextmanager
    def with_parts(self, name: str) -> Iterator[nn.Module]:
        """Inside the block the task's head and norms stand in the backbone's places."""
        own = {self.backbone.get_submodule(n): part for n, part in self.parts(name).items()}
        with ExitStack() as stack:
            for owner in list(self.backbone.modules()) if own else ():
                for place, child in list(owner._modules.items()):
                    if child in own:
                        owner._modules[place] = own[child]
                        stack.callback(owner._modules.__setitem__, place, child)
            yield self.backbone


class TaskView(nn.Module):
    """One task of a ``TaskSet``; shares all of its tensors."""

    def __init__(self, model: TaskSet, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The task's logits, ``[N, classes of the task]``."""
        return self.model.answer(self.name, *args, **kwargs)


@torch.no_grad()
def energy_moments(tasks: TaskSet, name: str, loader: Iterable[Any]) -> tuple[float, float]:
    """Mean and standard deviation of a task's energy over the first of its own samples."""
    device = device_of(tasks)
    found: list[Tensor] = []
    with evaluation(tasks):
        for inputs, labels in batches(loader, "extend"):
            inputs = inputs.to(device)
            outputs = tasks.outputs(name, *inputs.args, **inputs.kwargs)
            found.append(tasks.energy(name, outputs)[labels.to(device) != -100].double())
            if sum(map(len, found)) >= _ENERGY_SAMPLES:
                break
    energies = torch.cat(found)
    deviation = float(energies.std(correction=0))
    return float(energies.mean()), max(deviation, torch.finfo(torch.float32).tiny)


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a model by name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def _union(slices: Sequence[Slice]) -> Slice:
    found = slices[0]
    for other in slices[1:]:
        found = found | other
    return found


# A module's name in a ModuleDict may hold no dot; the prefix keeps a task called "type" or
# "forward" from meeting an attribute.


def _key(name: str) -> str:
    return "of_" + name.replace(".", "/")


def _name(key: str) -> str:
    return key.removeprefix("of_").replace("/", ".")
