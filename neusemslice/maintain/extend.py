"""Extension: learn new classes with the neurons that no task before needs.

A model that is extended for the first time becomes the first task of a ``TaskSet``: the old
classes' slice, which is first consolidated where old data is at hand, so that it answers alone.
Then, as every further time, the neurons of all tasks so far are frozen, and free ones are trained
on the new classes, with a new head and with batch norms of the new task's own. New neurons read old
ones; no old answer reads a new one, so none can change by a bit, which is checked before the result
is returned (``maintain/tasks.py`` says how a task is answered, ``maintain/freeing.py`` what is
free).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.graph import Graph, Inputs, device_of, evaluation
from neusemslice.maintain.consolidate import Consolidation, consolidate, first_samples
from neusemslice.maintain.freeing import needed, part_of, per_site, start_afresh, trained
from neusemslice.maintain.grow import grown
from neusemslice.maintain.replay import Together, replayed
from neusemslice.maintain.tasks import NOBODY, Task, TaskSet, batch_norms, energy_moments
from neusemslice.maintain.training import Training, fit
from neusemslice.optim import MaskedAdamW, row_gradients
from neusemslice.profiling import batches, first_inputs
from neusemslice.slicing import SemanticSlicing, Slice

OLD, NEW = "old", "new"
"""Names of the first task, and of a further one that is given none."""


@dataclass(frozen=True)
class ExtendReport:
    """What extension did.

    Attributes:
        task: name of the new task.
        old_classes, new_classes: global class numbers.
        free_neurons: share of the model's neurons that were trained.
        left: per site that can be freed, its neurons, and how many are free for further tasks.
        trained_parameters: number of parameters that were trained, the new head included.
        unchanged: whether the answers of all earlier tasks on the first batch are the same bits as
            before; always true in what ``extend`` returns.
        consolidation: of the old slice; ``None`` without old data, and for a ``TaskSet``.
        training: steps, seconds, losses and bytes of optimizer state of learning the new classes.
    """

    task: str
    old_classes: tuple[int, ...]
    new_classes: tuple[int, ...]
    free_neurons: float
    left: dict[str, tuple[int, int]]
    trained_parameters: int
    unchanged: bool
    consolidation: Consolidation | None
    training: Training


@dataclass(frozen=True)
class Extended:
    """What extension gives.

    Attributes:
        model: knows old and new classes.
        frozen: the slice of all earlier tasks.
        base: the model right before the new classes; under ``frozen`` it gives the old answers to
            the bit. The given model itself, unless it was consolidated or grown.
        report: what was done.
    """

    model: TaskSet
    frozen: Slice
    base: nn.Module
    report: ExtendReport


def extend(
    model: nn.Module,
    slicing: SemanticSlicing | None,
    loader: Iterable[Any],
    *,
    name: str = NEW,
    class_names: Sequence[str] | None = None,
    old: Iterable[Any] | None = None,
    replay: float = 0.0,
    capacity: float | None = None,
    reserve: float = 0.0,
    grow: float = 0.0,
    fresh: bool = True,
    epochs: int = 10,
    old_epochs: int = 2,
    lr: float = 3e-3,
    old_lr: float | None = None,
    weight_decay: float = 1e-2,
) -> Extended:
    """Teaches a copy of the model new classes; old answers stay bit-identical.

    Args:
        model: the one that the slicing was made from, or a ``TaskSet`` that earlier calls gave; it
            is left as it was. Its output layer must be linear and give the logits.
        slicing: of the old classes; ``None`` for a ``TaskSet``, whose slices are frozen.
        loader: samples of new classes only, labelled by global class numbers; passed over once to
            see the labels and once per epoch.
        name: of the new task.
        class_names: of the new classes, by rising number; by default the numbers.
        old: samples of the old classes, if there are any: to consolidate their slice with, and for
            ``replay``.
        replay: share of the old samples that are trained on as "none of the new classes", so that
            ``model(x)`` can tell better whose a sample is; no old answer needs it.
        capacity: share of the neurons to free in each place where any can be freed: with old
            samples those first that the others make up for, without them the least important. By
            default those that are critical to no class are free. Of a ``TaskSet`` what no task has
            is free.
        reserve: share of the free neurons that is left to later tasks.
        grow: adds so many neurons to each layer that can be widened, as a share of its own: free
            ones, nobody's yet. Answers are equal within rounding then, not to the bit, to those
            before; from then on they keep their bits.
        fresh: whether free neurons start anew; otherwise from the weights that they have.
        epochs, lr, weight_decay: of the training with ``MaskedAdamW``; ``lr`` falls to 0.
        old_epochs, old_lr: of consolidation; ``old_lr`` is ``lr`` if it is not given. Neurons that
            know the old classes may want a lower one than those that learn new classes.

    Raises:
        ValueError: for a slicing of another model, a share out of range, a model without a free
            neuron, a head that is not linear or not the last layer, a task's or class's name that
            is taken, or new data that holds old classes; if training does not stay finite. The
            given model is as it was then.
        RuntimeError: if an old answer changed.
    """
    _check_shares(capacity=capacity, reserve=reserve, replay=replay, grow=grow)
    if replay and old is None:
        raise ValueError("extend: replay needs old samples; give them as old=")
    tasks = model if isinstance(model, TaskSet) else _first_task(model, slicing, capacity, old)
    if tasks is model and (slicing is not None or capacity is not None):
        raise ValueError(
            "extend: a TaskSet keeps the slices of its tasks; give None as slicing, and no capacity"
        )
    new_classes = _new_classes(loader, tasks.classes)
    names = _new_names(tasks, name, class_names, new_classes)
    inputs = first_inputs(loader, "extend", device_of(tasks))
    widened = grown(tasks, grow, inputs) if grow else tasks
    own = part_of(widened.free, 1 - reserve)
    if not len(own):
        raise ValueError(
            "extend: no neuron is free, all are needed by the old classes or coupled; "
            + (
                "give grow= to widen the layers"
                if tasks is model
                else "slice with a lower threshold, give a capacity, or grow= to widen the layers"
            )
        )
    base, consolidation = widened, None
    if old is not None and tasks is not model:
        backbone, consolidation = consolidate(
            widened.backbone,
            ~widened.free,
            old,
            old_epochs,
            lr if old_lr is None else old_lr,
            weight_decay,
        )
        (first,) = widened.tasks.values()
        base = TaskSet(backbone, widened.head, (first,), {}, {})
        base.tasks[first.name] = replace(first, energy=energy_moments(base, first.name, old))
    extended = copy.deepcopy(base).eval()
    frozen = ~extended.free
    kept = (frozen | own).closed()
    own = kept - frozen
    task = Task(name, new_classes, kept, names, rejects=replay > 0)
    if fresh:
        start_afresh(extended.backbone, own)
    _add(extended, task)
    training, trained_parameters = _train(
        extended, task, own, loader, replayed(old, replay, base.classes), epochs, lr, weight_decay
    )
    extended.tasks[name] = replace(task, energy=energy_moments(extended, name, loader))
    unchanged = all(_same(extended, base, earlier, inputs) for earlier in base.tasks)
    if not unchanged:
        raise RuntimeError("extend: an old answer changed; this is a defect, please report it")
    return Extended(
        extended,
        frozen,
        base if tasks is model else base.backbone,
        ExtendReport(
            task=name,
            old_classes=tasks.classes,
            new_classes=new_classes,
            free_neurons=own.density,
            left=per_site(extended.free),
            trained_parameters=trained_parameters,
            unchanged=unchanged,
            consolidation=consolidation,
            training=training,
        ),
    )


def _check_shares(capacity: float | None, reserve: float, replay: float, grow: float) -> None:
    if capacity is not None and not 0 < capacity < 1:
        raise ValueError(f"extend: capacity must lie in (0, 1), got {capacity}")
    if not 0 <= reserve < 1:
        raise ValueError(f"extend: reserve must lie in [0, 1), got {reserve}")
    if not 0 <= replay <= 1:
        raise ValueError(f"extend: replay must lie in [0, 1], got {replay}")
    if not 0 <= grow < float("inf"):
        raise ValueError(f"extend: grow must be at least 0 and finite, got {grow}")


def _first_task(
    model: nn.Module,
    slicing: SemanticSlicing | None,
    capacity: float | None,
    old: Iterable[Any] | None,
) -> TaskSet:
    """The model as the first task of a set; shares its tensors."""
    if slicing is None:
        raise ValueError("extend: a model that is no TaskSet needs the slicing of its classes")
    graph = slicing.profile.graph
    Slice.whole(graph).check_model(model)
    head = _head(model, graph)
    known = (slicing.profile.samples > 0).tolist()
    classes = tuple(k if k < len(known) and known[k] else NOBODY for k in range(head.out_features))
    names = slicing.profile.class_names
    task = Task(
        OLD,
        classes,
        needed(model, slicing, capacity, None if old is None else first_samples(old), "extend"),
        tuple("" if k == NOBODY else names[k] for k in classes),
    )
    return TaskSet(model, graph.outputs[0], (task,), {}, {})


def _head(model: nn.Module, graph: Graph) -> nn.Linear:
    if len(graph.outputs) != 1:
        raise ValueError(
            f"extend: the model must end in one linear layer, its answers come from "
            f"{list(graph.outputs) or 'none'}"
        )
    head = model.get_submodule(graph.outputs[0])
    if not isinstance(head, nn.Linear) or head.out_features != graph.num_outputs:
        raise ValueError(
            f"extend: the head {graph.outputs[0]} must be a linear layer with the model's "
            f"{graph.num_outputs} outputs, got {type(head).__name__}"
        )
    return head


def _new_classes(loader: Iterable[Any], old: tuple[int, ...]) -> tuple[int, ...]:
    found: set[int] = set()
    for _, labels in batches(loader, "extend"):
        found.update(labels.unique().tolist())
    found.discard(-100)
    if not found:
        raise ValueError("extend: the loader has no labelled sample")
    if min(found) < 0:
        raise ValueError(f"extend: labels must be class numbers or -100, got {min(found)}")
    if both := sorted(found & set(old)):
        raise ValueError(f"extend: the new data holds old classes: {both}")
    return tuple(sorted(found))


def _new_names(
    tasks: TaskSet, name: str, class_names: Sequence[str] | None, classes: tuple[int, ...]
) -> tuple[str, ...]:
    """The new classes' names; refuses those that are taken."""
    if name in tasks.tasks:
        raise ValueError(f"extend: there is a task {name!r} already; give another name")
    if not name or any(c in name for c in "./\\"):
        raise ValueError(f"extend: a task's name must have neither '.' nor '/', got {name!r}")
    names = tuple(str(k) for k in classes) if class_names is None else tuple(class_names)
    if len(names) != len(classes):
        raise ValueError(
            f"extend: class_names must be of the {len(classes)} new classes {list(classes)}, "
            f"got {len(names)}"
        )
    taken = {n for task in tasks.tasks.values() for n in task.class_names if n}
    both = sorted(set(names) & taken)
    if both or len(set(names)) < len(names):
        raise ValueError(f"extend: each class needs a name of its own, got {both or names} twice")
    return names


def _add(extended: TaskSet, task: Task) -> None:
    """Gives the set a task with a new head, and norms that start from the first task's."""
    old: Any = extended.backbone.get_submodule(extended.head)
    head = nn.Linear(
        old.in_features,
        len(task.classes) + task.rejects,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    norms = {n: copy.deepcopy(norm) for n, norm in batch_norms(extended.backbone).items()}
    extended.add(task, head, norms)


def _train(
    extended: TaskSet,
    task: Task,
    own: Slice,
    loader: Iterable[Any],
    along: Iterable[Any] | None,
    epochs: int,
    lr: float,
    weight_decay: float,
) -> tuple[Training, int]:
    """Trains a task's own; also gives the number of parameters."""
    parts = extended.parts(task.name)
    rest = [p for part in parts.values() for p in part.parameters()]
    norms = [part for name, part in parts.items() if name != extended.head]
    view = _Outputs(extended, task.name)
    with row_gradients(view, [*trained(extended.backbone, own), {"params": rest}]) as rows:
        mixed = loader
        if along is not None and norms:
            mixed, along = Together(loader, along, "extend"), None
        training = fit(
            view,
            mixed,
            MaskedAdamW(rows.groups(), lr=lr, weight_decay=weight_decay),
            epochs,
            what="extend",
            moving=norms,
            classes=(*task.classes, NOBODY) if task.rejects else task.classes,
            along=along,
        )
        return training, sum(leaf.numel() for leaf in rows.parameters())


class _Outputs(nn.Module):
    """All outputs of one task, as they are trained."""

    def __init__(self, tasks: TaskSet, name: str) -> None:
        super().__init__()
        self.tasks = tasks
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.tasks.outputs(self.name, *args, **kwargs)


def _same(extended: TaskSet, base: TaskSet, name: str, inputs: Inputs) -> bool:
    """Whether a task's answers are the same bits as before."""
    with evaluation(extended), evaluation(base), torch.no_grad():
        before = base.answer(name, *inputs.args, **inputs.kwargs)
        return torch.equal(extended.answer(name, *inputs.args, **inputs.kwargs), before)
