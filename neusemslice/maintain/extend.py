"""Extension: learn new classes with the neurons that the old ones do not need.

Where old data is at hand, the old classes' slice is first consolidated: trained briefly with all
other neurons masked, so that it answers alone. Then it is frozen: rows, biases, norm affine and
running statistics of its neurons. What it does not need is free, and is trained on the new classes
together with a new head. A free neuron brings its own rows and, where the layer that reads it is
frozen whole (a residual stream), the columns with which it is read; under the old slice these
columns meet zeros. So old answers, given under the old slice, cannot change by a bit, which is
checked before the result is returned.

Coupled sites (residual streams) are frozen whole: their neurons are sums to which old neurons
contribute.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from neusemslice.graph import Graph, device_of, evaluation, logits_of
from neusemslice.maintain.tasks import Task, TaskModel
from neusemslice.maintain.training import Training, fit
from neusemslice.optim import MaskedAdamW
from neusemslice.profiling import batches, first_inputs
from neusemslice.slicing import SemanticSlicing, Slice

OLD, NEW = "old", "new"
"""Names of the two tasks of an extended model."""


@dataclass(frozen=True)
class ExtendReport:
    """What extension did.

    Attributes:
        old_classes, new_classes: global class numbers.
        free_neurons: share of the model's neurons that were free to learn.
        trained_parameters: number of parameters that were trained, the new head included.
        unchanged: whether the old answers on the first batch, under the old slice, are the same
            bits as before; always true in what ``extend`` returns.
        consolidation: steps, seconds, losses and bytes of optimizer state of training the old
            slice to stand alone; ``None`` without old data.
        training: the same of learning the new classes.
    """

    old_classes: tuple[int, ...]
    new_classes: tuple[int, ...]
    free_neurons: float
    trained_parameters: int
    unchanged: bool
    consolidation: Training | None
    training: Training


@dataclass(frozen=True)
class Extended:
    """What extension gives.

    Attributes:
        model: knows old and new classes.
        frozen: the old classes' slice.
        base: the model right before the new classes; under ``frozen`` it gives the old answers to
            the bit. The given model itself, unless it was consolidated.
        report: what was done.
    """

    model: TaskModel
    frozen: Slice
    base: nn.Module
    report: ExtendReport


def extend(
    model: nn.Module,
    slicing: SemanticSlicing,
    loader: Iterable[Any],
    *,
    old: Iterable[Any] | None = None,
    capacity: float | None = None,
    epochs: int = 10,
    old_epochs: int = 2,
    lr: float = 3e-3,
    weight_decay: float = 1e-2,
) -> Extended:
    """Teaches a copy of the model new classes; old answers stay bit-identical under their slice.

    Args:
        model: the one that the slicing was made from; it is left as it was. Its output layer must
            be linear and give the logits.
        slicing: of the old classes.
        loader: samples of new classes only, labelled by global class numbers; passed over once to
            see the labels and once per epoch.
        old: samples of the old classes, if there are any, to consolidate their slice with.
        capacity: share of the neurons of each uncoupled site to free, least important first. By
            default those that are critical to no class are free.
        epochs, lr, weight_decay: of the training with ``MaskedAdamW``; ``lr`` falls to 0.
        old_epochs: of consolidation.

    Raises:
        ValueError: for a slicing of another model, a capacity outside (0, 1), a model without a
            free neuron, a head that is not linear or not the last layer, or new data that holds
            old classes.
        RuntimeError: if an old answer changed.
    """
    graph = slicing.profile.graph
    Slice.whole(graph).check_model(model)
    if capacity is not None and not 0 < capacity < 1:
        raise ValueError(f"extend: capacity must lie in (0, 1), got {capacity}")
    head = _head(model, graph)
    old_classes = tuple((slicing.profile.samples > 0).nonzero().squeeze(1).tolist())
    new_classes = _new_classes(loader, old_classes)
    frozen = _frozen(slicing, capacity)
    free = ~frozen
    if not len(free):
        raise ValueError(
            "extend: no neuron is free, all are critical to the old classes or coupled; "
            "slice with a lower threshold, or give a capacity"
        )
    base, consolidation = model, None
    if old is not None:
        base, consolidation = _consolidate(model, frozen, old, old_epochs, lr, weight_decay)
    backbone = copy.deepcopy(base)
    new_head = nn.Linear(
        head.in_features,
        len(new_classes),
        bias=head.bias is not None,
        device=head.weight.device,
        dtype=head.weight.dtype,
    )
    extended = TaskModel(
        backbone,
        graph.outputs[0],
        (
            Task(OLD, tuple(range(head.out_features)), frozen),
            Task(NEW, new_classes, Slice.whole(graph)),
        ),
        {NEW: new_head},
    )
    groups = _trained(backbone, graph, free)
    groups.append({"params": list(new_head.parameters())})
    optimizer = MaskedAdamW(groups, lr=lr, weight_decay=weight_decay)
    with _free_statistics(backbone, free):
        training = fit(
            extended.task(NEW),
            loader,
            optimizer,
            epochs,
            what="extend",
            classes=new_classes,
        )
    inputs = first_inputs(loader, "extend", device_of(model))
    with evaluation(base), evaluation(backbone), torch.no_grad():
        with frozen.applied(base):
            before = logits_of(inputs.run(base))
        unchanged = torch.equal(extended.answer(OLD, *inputs.args, **inputs.kwargs), before)
    if not unchanged:
        raise RuntimeError("extend: an old answer changed; this is a defect, please report it")
    trained_parameters = sum(p.numel() for p in new_head.parameters()) + sum(
        parameter.numel() // parameter.shape[dim] * len(rows)
        for group in groups[:-1]
        for parameter, dim, rows in zip(
            group["params"], group["neuron_dims"], group["rows"], strict=True
        )
    )
    return Extended(
        extended,
        frozen,
        base,
        ExtendReport(
            old_classes=old_classes,
            new_classes=new_classes,
            free_neurons=free.density,
            trained_parameters=trained_parameters,
            unchanged=unchanged,
            consolidation=consolidation,
            training=training,
        ),
    )


def _consolidate(
    model: nn.Module,
    frozen: Slice,
    old: Iterable[Any],
    epochs: int,
    lr: float,
    weight_decay: float,
) -> tuple[nn.Module, Training]:
    """A copy in which the slice and the head were trained to answer with all else masked."""
    base = copy.deepcopy(model)
    head = base.get_submodule(frozen.graph.outputs[0])
    groups = [*frozen.parameters(base), {"params": list(head.parameters())}]
    optimizer = MaskedAdamW(groups, lr=lr, weight_decay=weight_decay)
    with frozen.applied(base):
        # Running statistics too have to become those of the slice alone.
        training = fit(base, old, optimizer, epochs, what="consolidate", freeze_statistics=False)
    return base, training


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


def _frozen(slicing: SemanticSlicing, capacity: float | None) -> Slice:
    """The old classes' slice: coupled sites whole, of the others what is not free."""
    graph = slicing.profile.graph
    critical = slicing.critical_slice()
    masks = {}
    for site in graph.sites:
        group = graph.groups[site.group]
        if group.kept_whole or len(group.sites) > 1:
            masks[site.name] = torch.ones(site.neurons, dtype=torch.bool)
        elif capacity is None:
            masks[site.name] = critical.mask(site.name)
        else:
            kept = max(1, math.ceil((1 - capacity) * site.neurons))
            order = slicing.importance(site.name).sort(descending=True, stable=True).indices
            masks[site.name] = torch.zeros(site.neurons, dtype=torch.bool)
            masks[site.name][order[:kept]] = True
    return Slice(graph, masks)


def _trained(backbone: nn.Module, graph: Graph, free: Slice) -> list[dict[str, Any]]:
    """Parameter groups of the free neurons: their rows, and columns in layers frozen whole."""
    groups = free.parameters(backbone)
    with_free_rows = {id(parameter) for group in groups for parameter in group["params"]}
    heads = {f"{name}.weight" for name in graph.outputs}
    columns: dict[tuple[str, int], list[Tensor]] = {}
    for site in graph.sites:
        neurons = free.mask(site.name).nonzero().squeeze(1)
        for span in site.columns:
            weight = backbone.get_parameter(span.tensor)
            if len(neurons) and span.tensor not in heads and id(weight) not in with_free_rows:
                columns.setdefault((span.tensor, span.dim), []).append(span.indices(neurons))
    if columns:
        groups.append(
            {
                "params": [backbone.get_parameter(name) for name, _ in columns],
                "neuron_dims": [dim for _, dim in columns],
                "rows": [torch.cat(rows).unique() for rows in columns.values()],
            }
        )
    return groups


@contextmanager
def _free_statistics(backbone: nn.Module, free: Slice) -> Iterator[None]:
    """Inside the block, batch norms in evaluation mode still learn the free neurons' statistics.

    Frozen channels are normalised by their running statistics, free ones by the batch's, as in
    training mode, and only the free ones' running statistics move.
    """
    rows: dict[str, list[Tensor]] = {}
    for site in free.graph.sites:
        neurons = free.mask(site.name).nonzero().squeeze(1)
        for span in site.rows:
            module, _, tensor = span.tensor.rpartition(".")
            if tensor == "running_mean" and len(neurons):
                rows.setdefault(module, []).append(span.indices(neurons))
    with ExitStack() as stack:
        for name, parts in rows.items():
            norm = backbone.get_submodule(name)
            if not isinstance(norm, _BatchNorm):
                continue  # an instance norm with running statistics keeps them
            channels = torch.cat(parts).to(device_of(norm))
            stack.callback(norm.register_forward_hook(_statistics_hook(channels)).remove)
        yield


def _statistics_hook(channels: Tensor) -> Any:
    def hook(norm: _BatchNorm, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        if args[0].numel() == args[0].shape[1]:
            return output  # one value per channel has no variance
        mean, var = norm.running_mean[channels], norm.running_var[channels]
        normalised = F.batch_norm(
            args[0].index_select(1, channels),
            mean,
            var,
            None if norm.weight is None else norm.weight[channels],
            None if norm.bias is None else norm.bias[channels],
            training=True,
            momentum=0.1 if norm.momentum is None else norm.momentum,
            eps=norm.eps,
        )
        # New tensors, because the backward pass still needs the ones that made `output`.
        norm.running_mean = norm.running_mean.index_copy(0, channels, mean)
        norm.running_var = norm.running_var.index_copy(0, channels, var)
        return output.index_copy(1, channels, normalised)

    return hook
