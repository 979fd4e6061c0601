"""Observation in somebody's own loop: hooks that turn activations into statistics.

Labels come before the forward pass, so that a site's statistics are taken the moment its reader is
called and nothing is kept. Only with the metric "taylor" are a batch's activations kept for its
backward pass, which keeps most of them anyway, and each only until its gradient is known.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from neusemslice.graph import (
    Graph,
    Inputs,
    Site,
    device_of,
    is_sharded,
    reset_compiler,
    shares,
    trace,
    unwrapped,
)
from neusemslice.ops import ClassOrder, ClassStats, class_order, class_stats_, contribution_
from neusemslice.profiling.batching import as_inputs, as_labels, as_mask
from neusemslice.profiling.deeplift import lift, name_of_baseline
from neusemslice.profiling.gradients import Kept, first_modules, in_backward, start_gradients
from neusemslice.profiling.profile import METRICS, Profile


@dataclass
class _Batch:
    """The batch that is being observed: its labels, and what was seen of it."""

    order: ClassOrder
    classes: Tensor
    labels: torch.Size
    weights: Tensor | None
    mask: Tensor | None
    observed: bool = False
    inputs: list[Inputs] = field(default_factory=list)
    # Calls of readers without gradients; those that are checkpointed run once more with them.
    without_gradients: Counter[str] = field(default_factory=Counter)


class Profiler:
    """Collects a profile while you run the model yourself.

        with nss.Profiler(model, inputs=x[:2], num_classes=10) as profiler:
            for x, y in loader:
                with profiler.batch(y):
                    model(x)
        profile = profiler.profile

    With "taylor" among the metrics, the block must also run a backward pass of a loss that is
    summed over the samples. Parameters may be frozen: it then finds no gradients but those of
    activations. What ``torch.utils.checkpoint`` runs again on the way is not counted again. With
    "deeplift", the model is run once more at the block's end, beside its baseline (see
    ``nss.profiling.deeplift``). The model's mode and flags are yours: use ``model.eval()`` unless
    you want statistics of training mode.

    Hooks are there between entering and leaving the profiler; ``batch`` alone installs them for
    its own block. The compiler is reset whenever hooks come or go, because compiled code would
    ignore them. Statistics and contributions are operators within the compiled graphs
    (``fullgraph=True`` works).

    Nothing in a batch waits for the device. Leaving does, once, for what could not be said before:
    it warns of sites with NaN or infinite values (``RuntimeWarning``; they were counted in
    ``Profile.nonfinite()`` and entered no other statistic), and refuses a profile that lacks
    samples because their labels were out of range.

    Args:
        model: what to observe; it is left as it was. Sites of a model that is wrapped by
            ``torch.compile`` or ``DistributedDataParallel`` have the names of the wrapped one.
        inputs: one small batch to trace the model with: a tensor, a tuple of arguments, or a
            mapping of keyword arguments.
        metrics: among ``METRICS``.
        num_classes: ``K``; by default the number of the model's outputs.
        class_names: ``K`` names; by default "0", "1", ….
        sites: shell patterns of the names of sites to observe; all by default.
        baseline: what "deeplift" compares with: "zeros", or a tensor that broadcasts to the first
            input; token ids where that holds tokens.

    Attributes:
        profile: the statistics so far.
        batches: how many batches were begun.

    Raises:
        TypeError: if the model returns no logits.
        ValueError: for an unknown metric, a pattern that matches no site, or not ``K`` names; on
            leaving, if labels on a GPU were out of range (``batch`` says so of others).
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | Inputs,
        metrics: Sequence[str] = ("avg",),
        *,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        sites: Sequence[str] | None = None,
        baseline: str | Tensor = "zeros",
    ) -> None:
        unknown = [metric for metric in metrics if metric not in METRICS]
        if unknown or not metrics:
            raise ValueError(f"profile: metrics must be among {METRICS}, got {tuple(metrics)}")
        self._model = unwrapped(model)
        # Tensors made in inference mode could not be changed after it.
        with torch.inference_mode(False):
            graph = _select(trace(self._model, as_inputs(inputs)), sites)
            k = graph.num_outputs if num_classes is None else num_classes
            names = tuple(str(i) for i in range(k)) if class_names is None else tuple(class_names)
            if len(names) != k:
                raise ValueError(f"profile: class_names must be {k} names, got {len(names)}")
            profile = Profile.empty(
                graph, names, metrics, device_of(model), name_of_baseline(baseline)
            )
        self.profile = profile
        self.batches = 0
        # Labels that were neither counted nor -100: those out of range, which a GPU passes over.
        self._lost = profile.samples.new_zeros((), dtype=torch.int64)
        self._gradients = "taylor" in metrics
        self._lifts = "deeplift" in metrics
        self._baseline = baseline
        # A module can be the first reader of several sites (a concatenation).
        self._observed: dict[str, list[Site]] = {}
        for site in graph.sites:
            self._observed.setdefault(site.readers[0].module, []).append(site)
        self._anchor = torch.zeros((), device=device_of(model), requires_grad=True)
        self._batch: _Batch | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def graph(self) -> Graph:
        """The observed sites."""
        return self.profile.graph

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("Profiler: entered twice")
        self._install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()
        if kind is None:
            self.conclude()

    def conclude(self) -> None:
        """Says what could not be said while observing; leaving the profiler does it too.

        Waits for the device.

        Raises:
            ValueError: if labels were out of range.
        """
        self.check_labels()
        if bad := self.profile.nonfinite():
            sites = ", ".join(f"{name} ({count:,})" for name, count in bad.items())
            warnings.warn(
                f"profile: NaN or infinite values were left out of the statistics of {sites}",
                RuntimeWarning,
                stacklevel=3,
            )

    def check_labels(self) -> None:
        """Looks whether all labels so far were counted; waits for the device.

        Raises:
            ValueError: if some were out of range.
        """
        if lost := int(self._lost):
            raise ValueError(
                f"profile: {lost} labels lay outside [0, {self.profile.num_classes}) and were not "
                "-100, so the profile lacks their samples"
            )

    def _install(self) -> None:
        reset_compiler()
        for name in self._observed:
            module = self._model.get_submodule(name)
            # A sharded module gives its input a node of its own in autograd's graph, which only
            # its own part of the gradient would reach.
            handle = module.register_forward_pre_hook(
                self._hook(name), with_kwargs=True, prepend=is_sharded(module)
            )
            self._handles.append(handle)
        if self._gradients:
            for module in first_modules(self._model, self.graph):
                self._handles.append(module.register_forward_hook(self._start))
        if self._lifts:
            self._handles.append(
                self._model.register_forward_pre_hook(self._note_inputs, with_kwargs=True)
            )

    def _note_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        if self._batch is not None:
            self._batch.inputs.append(Inputs(args, kwargs).copy())

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        reset_compiler()

    @contextmanager
    def batch(
        self, labels: Any, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Iterator[None]:
        """Observes the forward pass inside the block, and with "taylor" its backward pass.

        Args:
            labels: integers ``[N]``, or ``[N, T]`` where every token has its own label; -100 is
                ignored. Or floating-point ``[N, K]``, not negative: how much each sample belongs
                to each class; a row of zeros is ignored. Tensor, list or array.
            mask: bool ``[N, T]``, False for padding; used at sites that see tokens.
            weights: of the samples ``[N]``, finite and not negative.

        Raises:
            TypeError, ValueError: for labels, mask or weights of another dtype or shape, or labels
                out of range, naming the batch by its number; and, naming the site, if they do not
                fit what the model sees.
            RuntimeError: if the block did not run the model.
        """
        with torch.no_grad():
            batch = self._prepared(labels, mask, weights)
        installed = bool(self._handles)
        if not installed:
            self._install()
        self._batch = batch
        versions = self._versions()
        try:
            yield
            if not batch.observed:
                raise RuntimeError(
                    "profile: no site was seen within the batch's block; run the model in it"
                )
            if self._gradients:
                self._check_gradients(batch, versions)
            if self._lifts:
                self._batch = None  # the hooks have seen the batch
                self._lift(batch)
        finally:
            self._batch = None
            batch.inputs.clear()
            if not installed:
                self._remove()

    def _prepared(self, labels: Any, mask: Tensor | None, weights: Tensor | None) -> _Batch:
        """The batch on the model's device, checked as far as that needs no wait for a device."""
        where, num_classes = f"profile: batch {self.batches}", self.profile.num_classes
        self.batches += 1
        y = as_labels(labels, where, soft=True)
        soft = y.is_floating_point()
        if soft and y.shape[1] != num_classes:
            raise ValueError(
                f"{where}: soft labels must be [N, {num_classes}], one column for each class, "
                f"got {list(y.shape)}"
            )
        if soft and y.device.type == "cpu" and not bool(((y >= 0) & y.isfinite()).all()):
            raise ValueError(f"{where}: soft labels must be finite and not negative")
        shape = y.shape[:1] if soft else y.shape
        if mask is not None:
            mask = as_mask(mask, shape, where)
        if weights is not None and weights.shape != shape[:1]:
            raise ValueError(
                f"{where}: weights must have shape [{shape[0]}], got {list(weights.shape)}"
            )
        if len(shape) == 2:
            # Each token is a sample; padding has no class, and tokens weigh as their sample.
            if mask is not None:
                # Whichever is on the CPU moves: the other way round would wait for a GPU.
                place = y.device if mask.device.type == "cpu" else mask.device
                y = y.to(place, non_blocking=True)
                y = y.masked_fill(~mask.to(place, non_blocking=True), -100)
                mask = None
            if weights is not None:
                weights = weights.unsqueeze(1).expand(shape).flatten()
        # Where the labels are, so that those of a loader are checked without a wait for a GPU.
        try:
            order = class_order(y if soft else y.flatten(), num_classes)
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('class_order: ')}") from error
        device = self._lost.device
        if not soft:
            lost = (y != -100).sum() - order.offsets[-1]
            self._lost += lost.to(device, non_blocking=True)
        return _Batch(
            order.to(device),
            y,
            shape,
            None if weights is None else weights.to(device, non_blocking=True),
            None if mask is None else mask.to(device, non_blocking=True),
        )

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        first = self._observed[name][0]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            batch = self._batch
            if batch is None:
                return None
            batch.observed = True
            changed = None
            if first.readers[0].routed:
                x, *changed = shares(args, kwargs, first.neurons)
            else:
                x = args[0] if args else kwargs["input"]
            # A checkpointed part runs again during the backward pass.
            if not in_backward():
                for site in self._observed[name]:
                    view = _view(site, x.detach(), batch)
                    class_stats_(
                        self.profile.activations[site.name],
                        view.x,
                        batch.order,
                        weight=batch.weights,
                        mask=view.mask,
                        neuron_dim=site.readers[0].neuron_dim,
                    )
            if self._gradients:
                self._await_gradient(name, x, batch)
            return None if changed is None else tuple(changed)

        return hook

    def _start(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Has gradients flow from here on, where nothing before requires them."""
        if self._batch is None or not torch.is_grad_enabled():
            return None
        return start_gradients(output, self._anchor)

    def _await_gradient(self, name: str, x: Tensor, batch: _Batch) -> None:
        """Has the backward pass add ``a · g`` the moment that the gradient of ``x`` is known.

        A site that the loss does not depend on has no gradient, and contributes nothing.
        """
        if not x.requires_grad:
            batch.without_gradients[name] += 1
            return
        # A checkpoint that keeps its graph must save again what it saved before.
        kept = Kept(x.detach(), self._anchor)
        if in_backward():
            if not batch.without_gradients[name]:
                return
            batch.without_gradients[name] -= 1

        def contribute(gradient: Tensor) -> None:
            if self._batch is batch:
                states = self.profile.contributions
                self._contribute(states, name, kept.take(), gradient.detach(), batch)

        x.register_hook(contribute)

    def _contribute(
        self, states: dict[str, ClassStats], name: str, x: Tensor, g: Tensor, batch: _Batch
    ) -> None:
        """Adds ``x · g`` of what a reader reads."""
        for site in self._observed[name]:
            view = _view(site, x, batch)
            contribution_(
                states[site.name],
                view.x,
                _view(site, g, batch).x,
                batch.order,
                weight=batch.weights,
                mask=view.mask,
                neuron_dim=site.readers[0].neuron_dim,
            )

    def _versions(self) -> int:
        """Rises with every contribution, in compiled code too."""
        return sum(stats.count._version for stats in self.profile.contributions.values())

    def _check_gradients(self, batch: _Batch, versions: int) -> None:
        """Refuses a batch whose contributions could not be found.

        Args:
            versions: what they were when it began.
        """
        if without := sorted(name for name, calls in batch.without_gradients.items() if calls):
            raise ValueError(
                f"profile: the metric 'taylor' needs gradients, but {', '.join(without)} ran "
                "without (torch.no_grad)"
            )
        if self._versions() == versions:
            raise ValueError(
                "profile: the metric 'taylor' needs a backward pass within the batch's block, of "
                "a loss that depends on what the sites see"
            )

    def _lift(self, batch: _Batch) -> None:
        """Adds the DeepLIFT contributions of the batch."""
        if not batch.inputs:
            raise RuntimeError(
                "profile: the metric 'deeplift' needs the model itself to be called in the "
                "batch's block, not only parts of it"
            )
        for inputs in batch.inputs:
            lifted = lift(self._model, inputs, batch.classes, self._baseline, [*self._observed])
            for name, (delta, multiplier) in lifted.modules.items():
                self._contribute(self.profile.lifts, name, delta, multiplier, batch)


@dataclass
class _View:
    """A site's part of what its reader reads, and the mask over its positions."""

    x: Tensor
    mask: Tensor | None


def _view(site: Site, x: Tensor, batch: _Batch) -> _View:
    """Fits labels and mask to what a site's reader reads.

    Raises:
        ValueError: naming the site, if they do not fit.
    """
    labels, reader = batch.labels, site.readers[0]
    windows = reader.pieces and x.ndim > 2
    if reader.pieces and labels[0] and x.shape[0] % labels[0] == 0:
        x = x.reshape(labels[0], -1, x.shape[-1])
    # The tokens of windows are not in the order of the model's input.
    has_tokens = x.ndim == 3 and reader.dim == -1 and not windows
    if len(labels) == 2:
        if not has_tokens or x.shape[:2] != labels:
            raise ValueError(
                f"profile: the labels are of {labels[0]} x {labels[1]} tokens, "
                f"but site {site.name} sees {list(x.shape)}; choose the sites that see tokens"
            )
        x = x.flatten(0, 1)
    elif x.shape[0] != labels[0]:
        raise ValueError(
            f"profile: the batch has {labels[0]} labels, but {x.shape[0]} samples "
            f"at site {site.name}"
        )
    mask = batch.mask if x.ndim > 2 else None
    if mask is not None and (not has_tokens or x.shape[:2] != mask.shape):
        raise ValueError(
            f"profile: the mask is of {mask.shape[0]} x {mask.shape[1]} tokens, "
            f"but site {site.name} sees {list(x.shape)}"
        )
    if mask is not None and reader.repeat > 1:
        mask = mask.unsqueeze(-1).expand(*mask.shape, reader.repeat)
    return _View(reader.take(x, site.neurons), mask)


def _select(graph: Graph, patterns: Sequence[str] | None) -> Graph:
    """The graph with the sites that a pattern matches.

    Raises:
        ValueError: for a pattern that matches none.
    """
    if patterns is None:
        return graph
    chosen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter((site.name for site in graph.sites), pattern)
        if not found:
            known = ", ".join(site.name for site in graph.sites)
            raise ValueError(f"profile: no site matches {pattern!r}; the model has {known}")
        chosen.update(found)
    return graph.only(chosen)
