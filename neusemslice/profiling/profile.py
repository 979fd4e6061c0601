"""A profile: streaming statistics of every site of a model, per class."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neusemslice import _files
from neusemslice._progress import track
from neusemslice.graph import (
    Graph,
    Inputs,
    Reader,
    device_of,
    evaluation,
    logits_of,
    trace,
)
from neusemslice.ops import STATISTICS, ClassOrder, ClassStats, class_order, class_stats_
from neusemslice.profiling.batching import LabelsOf, batches

METRICS = ("avg", "var", "taylor")
"""Contribution metrics that a profile can be made for."""

LossOf = Callable[[Any, Tensor], Tensor]
"""Takes the model's output and the labels; returns the loss of each sample or their sum."""

_CONTRIBUTION_STATISTICS = ("mean", "mean_abs")


@dataclass
class Profile:
    """Statistics of every site of a model, per class.

    Attributes:
        graph: the model's sites.
        class_names: one per class; ``K`` of them.
        metrics: the contribution metrics that the profile can give scores for.
        activations: per site, of the pooled activation ``a[n, c]``.
        contributions: per site, of the pooled ``a · g`` where ``g`` is the gradient of the
            sample's loss; empty without the metric "taylor".
    """

    graph: Graph
    class_names: tuple[str, ...]
    metrics: tuple[str, ...]
    activations: dict[str, ClassStats]
    contributions: dict[str, ClassStats]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def samples(self) -> Tensor:
        """Samples seen of each class, float64 ``[K]``."""
        return next(iter(self.activations.values())).count

    def nonfinite(self) -> dict[str, int]:
        """Number of NaN or infinite values at each site that had any; waits for the device."""
        counts = {}
        for name, stats in self.activations.items():
            total = int(stats.nonfinite.sum())
            if name in self.contributions:
                total += int(self.contributions[name].nonfinite.sum())
            if total:
                counts[name] = total
        return counts

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the profile to one file, atomically."""
        return _files.write(path, "profile", *self.to_file())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """
        return _files.read(path, "profile", cls.from_file)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON content that make up the profile."""
        tensors = {
            f"{part}/{site}/{name}": tensor
            for part, stats in (
                ("activations", self.activations),
                ("contributions", self.contributions),
            )
            for site, state in stats.items()
            for name, tensor in state.tensors().items()
        }
        content = {
            "graph": self.graph.to_json(),
            "class_names": list(self.class_names),
            "metrics": list(self.metrics),
        }
        return tensors, content

    @classmethod
    def from_file(cls, tensors: dict[str, Tensor], content: dict[str, Any]) -> Profile:
        """The inverse of ``to_file``; other tensors and keys are left alone."""
        graph = Graph.from_json(content["graph"])
        class_names = tuple(str(name) for name in content["class_names"])

        def states(part: str, statistics: Iterable[str]) -> dict[str, ClassStats]:
            read = {}
            for site in graph.sites:
                state = ClassStats.empty(len(class_names), site.neurons, statistics)
                for name, tensor in state.tensors().items():
                    stored = tensors[f"{part}/{site.name}/{name}"]
                    if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
                        raise ValueError(
                            f"{part} of site {site.name} have the wrong shape or dtype"
                        )
                    tensor.copy_(stored)
                read[site.name] = state
            return read

        metrics = tuple(str(metric) for metric in content["metrics"])
        return cls(
            graph,
            class_names,
            metrics,
            states("activations", STATISTICS),
            states("contributions", _CONTRIBUTION_STATISTICS) if "taylor" in metrics else {},
        )


def profile(
    model: nn.Module,
    loader: Iterable[Any],
    metrics: Sequence[str] = ("avg", "taylor"),
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    loss: LossOf | None = None,
    labels: LabelsOf | None = None,
) -> Profile:
    """Observes every site and every class of a model in one sweep over a loader.

    The model runs in evaluation mode. With "taylor" among the metrics one backward pass per batch
    follows, for gradients of activations only: parameters' ``.grad`` is neither read nor written.
    The loss is summed over the batch, so that each sample's gradient is its own. No activation is
    kept beyond its batch, and the model is left as it was, whatever happens.

    Args:
        model: returns logits ``[N, K]``, has ``.logits``, or returns a tuple that starts with them.
        loader: gives batches ``(x, …, labels)`` or mappings with "labels"; labels are integers
            ``[N]`` in ``[0, K)``, or -100 for samples to ignore.
        metrics: among ``METRICS``; see ``neusemslice.slicing.scores``.
        num_classes: ``K``; by default the number of the model's outputs.
        class_names: ``K`` names; by default "0", "1", ….
        loss: for models whose loss is not the cross-entropy of the logits.
        labels: for batches of another form; takes a batch and returns its labels.

    Raises:
        ValueError, TypeError: for an unknown metric, a loader that yields nothing, labels or
            batches of another form, labels out of range.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"profile: metrics must be among {METRICS}, got {tuple(metrics)}")
    device = device_of(model)
    graph: Graph | None = None
    sweep: _Sweep | None = None
    for inputs, y in batches(track(loader, "profile"), "profile", device, labels):
        if graph is None or sweep is None:
            graph = trace(model, inputs.head(2))
            k = graph.num_outputs if num_classes is None else num_classes
            names = _names(class_names, k)
            sweep = _Sweep(model, graph, k, "taylor" in metrics, loss or _cross_entropy)
        sweep.batch(inputs, y)
    assert graph is not None
    assert sweep is not None
    return Profile(graph, names, tuple(metrics), sweep.activations, sweep.contributions)


def _names(given: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    if given is None:
        return tuple(str(k) for k in range(num_classes))
    if len(given) != num_classes:
        raise ValueError(f"profile: class_names must be {num_classes} names, got {len(given)}")
    return tuple(given)


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(output), labels, reduction="sum")


class _Sweep:
    """Hooks that turn each batch's activations into statistics, and the state these go to."""

    def __init__(
        self, model: nn.Module, graph: Graph, num_classes: int, gradients: bool, loss: LossOf
    ) -> None:
        device = device_of(model)
        self.model = model
        self.loss = loss
        self.num_classes = num_classes
        self.gradients = gradients
        self.activations = {
            site.name: ClassStats.empty(num_classes, site.neurons, device=device)
            for site in graph.sites
        }
        self.contributions = {
            site.name: ClassStats.empty(
                num_classes, site.neurons, _CONTRIBUTION_STATISTICS, device=device
            )
            for site in graph.sites
            if gradients
        }
        # A module can be the first reader of several sites (a concatenation).
        self.observed: dict[str, list[tuple[str, Reader]]] = {}
        for site in graph.sites:
            first = site.readers[0]
            self.observed.setdefault(first.module, []).append((site.name, first))

    def batch(self, inputs: Inputs, labels: Tensor) -> None:
        order = class_order(labels, self.num_classes)
        tensors: dict[str, Tensor] = {}

        def observe(module: str, x: Tensor) -> None:
            for site, reader in self.observed[module]:
                self._add(self.activations[site], site, x.detach(), reader, order)
            if self.gradients:
                tensors[module] = x

        handles = []
        with evaluation(self.model, requires_grad=self.gradients or None):
            try:
                for name in self.observed:
                    hook = _pre_hook(name, observe)
                    handles.append(
                        self.model.get_submodule(name).register_forward_pre_hook(
                            hook, with_kwargs=True
                        )
                    )
                with torch.set_grad_enabled(self.gradients):
                    output = inputs.run(self.model)
                    if self.gradients:
                        total = self.loss(output, labels).sum()
            finally:
                for handle in handles:
                    handle.remove()
            if self.gradients:
                self._backward(total, tensors, order)

    def _backward(self, total: Tensor, tensors: dict[str, Tensor], order: ClassOrder) -> None:
        modules = list(tensors)
        gradients = torch.autograd.grad(total, [tensors[m] for m in modules], allow_unused=True)
        for module, gradient in zip(modules, gradients, strict=True):
            if gradient is None:
                continue  # the loss does not depend on this site: it contributes nothing
            for site, reader in self.observed[module]:
                state = self.contributions[site]
                a = reader.take(tensors[module].detach(), state.neurons)
                g = reader.take(gradient, state.neurons)
                product = (a * g).movedim(reader.neuron_dim, 1).flatten(2) if a.ndim > 2 else a * g
                pooled = product.mean(2) if product.ndim > 2 else product
                class_stats_(state, pooled, order)

    def _add(
        self, state: ClassStats, site: str, x: Tensor, reader: Reader, order: ClassOrder
    ) -> None:
        if x.shape[0] != order.order.shape[0]:
            raise ValueError(
                f"profile: the batch has {order.order.shape[0]} labels, but {x.shape[0]} samples "
                f"at site {site}"
            )
        class_stats_(state, reader.take(x, state.neurons), order, neuron_dim=reader.neuron_dim)


def _pre_hook(
    name: str, observe: Callable[[str, Tensor], None]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observe(name, args[0] if args else kwargs["input"])

    return hook
