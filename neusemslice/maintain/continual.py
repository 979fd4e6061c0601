"""How well a sequence of tasks is learned and kept: accuracies, and what is made of them.

With ``R[i, j]`` the accuracy on task ``j`` after task ``i`` was learned, of ``T`` tasks:

- ACC  = mean over j of R[T-1, j]
- BWT  = mean over j < T-1 of R[T-1, j] - R[j, j]
- FWT  = mean over j > 0 of R[j-1, j] - b[j], with b[j] the accuracy of an untrained model

(Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, 2017), and

- forgetting = mean over j < T-1 of max over i < T-1 of R[i, j] - R[T-1, j]

(Chaudhry et al., Riemannian Walk for Incremental Learning, 2018), i from j on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neusemslice._progress import track
from neusemslice.graph import device_of, evaluation
from neusemslice.maintain.tasks import NOBODY, TaskSet
from neusemslice.profiling import batches


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy on the samples of one task.

    Attributes:
        given: when the task is given (task-incremental).
        inferred: when the set chooses among the classes of all tasks (class-incremental).
        chosen: share of the samples whose task was chosen rightly.
        samples: how many labelled ones there were.
    """

    given: float
    inferred: float
    chosen: float
    samples: int


@torch.no_grad()
def task_accuracies(
    tasks: TaskSet, loaders: Mapping[str, Iterable[Any]]
) -> dict[str, TaskAccuracy]:
    """Scores a set on labelled samples of each task, in evaluation mode.

    Args:
        loaders: by the task's name; labels are global class numbers, one per sample or token.

    Raises:
        KeyError: for a task that there is none of.
        ValueError: for a label that is none of the task's, or a loader without labelled samples.
    """
    device = device_of(tasks)
    order = list(tasks.tasks)
    found = {}
    with evaluation(tasks):
        for name, loader in loaders.items():
            tasks.task(name)
            classes = torch.tensor(tasks.tasks[name].classes, device=device)
            own = [k for k in tasks.tasks[name].classes if k != NOBODY]
            known = torch.tensor([*own, -100])
            given, inferred, chosen, samples = torch.zeros(4, dtype=torch.int64, device=device)
            for inputs, raw in batches(track(loader, f"score {name}"), "task_accuracies"):
                if strange := sorted(set(raw[~torch.isin(raw, known.to(raw.device))].tolist())):
                    raise ValueError(
                        f"task_accuracies: the classes of task {name} are {own}, got labels "
                        f"{strange}"
                    )
                labels, inputs = raw.to(device), inputs.to(device)
                answer = tasks.answer(name, *inputs.args, **inputs.kwargs)
                answer = answer.masked_fill(classes == NOBODY, -torch.inf)
                joint = tasks(*inputs.args, **inputs.kwargs)
                given += (classes[answer.argmax(-1)] == labels).sum()
                inferred += (joint.argmax(-1) == labels).sum()
                chose = tasks.choose(*inputs.args, **inputs.kwargs) == order.index(name)
                chosen += (chose & (labels != -100)).sum()
                samples += (labels != -100).sum()
            count = int(samples)
            if not count:
                raise ValueError(f"task_accuracies: task {name} has no labelled sample")
            found[name] = TaskAccuracy(
                int(given) / count, int(inferred) / count, int(chosen) / count, count
            )
    return found


def average_accuracy(matrix: Tensor) -> float:
    """ACC.

    Args:
        matrix: accuracies ``[T, T]``; ``matrix[i, j]`` of task ``j`` after task ``i``. Entries that
            the measure does not use may be NaN.

    Raises:
        ValueError: if it is not square, or an entry that is used is not in [0, 1].
    """
    return _mean(_square(matrix)[-1])


def backward_transfer(matrix: Tensor) -> float:
    """BWT; 0 for one task. See ``average_accuracy``."""
    matrix = _square(matrix)
    return _mean(matrix[-1, :-1]) - _mean(matrix.diagonal()[:-1]) if len(matrix) > 1 else 0.0


def forward_transfer(matrix: Tensor, untrained: Tensor) -> float:
    """FWT; 0 for one task. See ``average_accuracy``.

    Args:
        untrained: accuracy on each task of a model that has learned nothing, ``[T]``.

    Raises:
        ValueError: as ``average_accuracy``; if ``untrained`` has another length.
    """
    matrix = _square(matrix)
    if untrained.shape != matrix.shape[:1]:
        raise ValueError(
            f"untrained accuracies must be [{len(matrix)}], got {list(untrained.shape)}"
        )
    return _mean(matrix.diagonal(1)) - _mean(untrained.double()[1:]) if len(matrix) > 1 else 0.0


def forgetting(matrix: Tensor) -> float:
    """Forgetting; 0 for one task. See ``average_accuracy``."""
    matrix = _square(matrix)
    lost = [
        float(_accuracies(matrix[j:-1, j]).amax() - _accuracies(matrix[-1:, j])[0])
        for j in range(len(matrix) - 1)
    ]
    return sum(lost) / len(lost) if lost else 0.0


def _square(matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"accuracies must be [T, T], got {list(matrix.shape)}")
    return matrix.double()


def _accuracies(some: Tensor) -> Tensor:
    if not bool(((some >= 0) & (some <= 1)).all()):
        raise ValueError(f"accuracies must lie in [0, 1], got {some.tolist()}")
    return some


def _mean(some: Tensor) -> float:
    return float(_accuracies(some).mean())
