"""A model that has learned several tasks: one backbone, and per task a slice and a head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.graph import logits_of
from neusemslice.slicing import Slice


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: of the task.
        classes: global class number of each of its outputs.
        slice: the neurons that answer it; all others are masked.
    """

    name: str
    classes: tuple[int, ...]
    slice: Slice


class TaskModel(nn.Module):
    """A backbone that answers several tasks.

    ``model.task(name)(x)`` gives one task's logits, under its slice and with its head.
    ``model(x)`` gives logits ``[N, K]`` over all classes by their global numbers, each computed
    under its own task; a class that no task knows has ``-inf``.

    Args:
        backbone: the model that the slices belong to; its own head answers the first task.
        head: name of the backbone's output layer.
        tasks: the first is answered by the backbone's head.
        heads: a head for each further task, by name; it reads what the backbone's head reads.
    """

    def __init__(
        self, backbone: nn.Module, head: str, tasks: tuple[Task, ...], heads: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        for task in tasks:
            task.slice.check_model(backbone)
        self.backbone = backbone
        self.head = head
        self.tasks = {task.name: task for task in tasks}
        # The prefix keeps a task called "type" or "forward" from meeting a module's attribute.
        self.heads = nn.ModuleDict({f"task_{name}": module for name, module in heads.items()})

    def task(self, name: str) -> TaskView:
        """The module that answers one task.

        Raises:
            KeyError: naming the tasks that there are.
        """
        if name not in self.tasks:
            raise KeyError(f"no task {name!r}; there are {list(self.tasks)}")
        return TaskView(self, name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits over all classes by their global numbers, ``[N, K]``."""
        answers = {name: self.answer(name, *args, **kwargs) for name in self.tasks}
        some = next(iter(answers.values()))
        total = 1 + max(k for task in self.tasks.values() for k in task.classes)
        logits = some.new_full((*some.shape[:-1], total), -torch.inf)
        for name, answer in answers.items():
            index = torch.tensor(self.tasks[name].classes, device=answer.device)
            logits = logits.index_copy(-1, index, answer.to(logits.dtype))
        return logits

    def answer(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """One task's logits, ``[N, classes of the task]``."""
        with self.tasks[name].slice.masking(self.backbone), self._head_of(name):
            return logits_of(self.backbone(*args, **kwargs))

    @contextmanager
    def _head_of(self, name: str) -> Iterator[None]:
        """Inside the block the backbone's head gives the answer of the task's head."""
        key = f"task_{name}"
        if key not in self.heads:
            yield
            return
        head = self.heads[key]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> Any:
            return head(*args, **kwargs)

        handle = self.backbone.get_submodule(self.head).register_forward_hook(
            hook, with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()


class TaskView(nn.Module):
    """One task of a ``TaskModel``; shares all of its tensors."""

    def __init__(self, model: TaskModel, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The task's logits, ``[N, classes of the task]``."""
        return self.model.answer(self.name, *args, **kwargs)
