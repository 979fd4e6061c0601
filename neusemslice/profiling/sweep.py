"""One sweep over a loader, from a model to its profile."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neusemslice import _files
from neusemslice._progress import track
from neusemslice.graph import device_of, evaluation, logits_of, smallest
from neusemslice.profiling.batching import LabelsOf, batches
from neusemslice.profiling.deeplift import mean_input
from neusemslice.profiling.profile import METRICS, Profile
from neusemslice.profiling.profiler import Profiler

CHECKPOINT_SECONDS = 30.0
"""Time between two checkpoints of a sweep."""

LossOf = Callable[[Any, Tensor], Tensor]
"""Takes the model's output and the labels; returns the loss of each sample or their sum."""


def profile(
    model: nn.Module,
    loader: Iterable[Any],
    metrics: Sequence[str] = ("avg", "taylor"),
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    loss: LossOf | None = None,
    labels: LabelsOf | None = None,
    baseline: str | Tensor = "zeros",
    checkpoint: str | os.PathLike[str] | None = None,
) -> Profile:
    """Observes every site and every class of a model in one sweep over a loader.

    The model runs in evaluation mode. With "taylor" among the metrics one backward pass per batch
    follows, for gradients of activations only: parameters' ``.grad`` is neither read nor written.
    The loss is summed over the batch, so that each sample's gradient is its own. No activation is
    kept beyond its batch, and the model is left as it was, whatever happens.

    Among several processes each profiles its own share; ``Profile.all_reduce`` merges them. Ranks
    that share a sharded model (FSDP2) run it together, so each must have equally many batches,
    though of any size; otherwise those that have more wait for the others forever.

    A value that is NaN or infinite enters no statistic but ``Profile.nonfinite()``, which counts
    them per site; at the end a ``RuntimeWarning`` names the sites and counts.

    Args:
        model: returns logits ``[N, K]``, has ``.logits``, or returns a tuple that starts with them.
        loader: gives batches ``(x, …, labels)``, or mappings or dataclasses with "labels" whose
            other items are the model's keyword arguments. Labels are tensors, lists or arrays of
            integers in ``[0, K)``, or -100 for samples to ignore: ``[N]``, or ``[N, T]`` for one
            per token; or floating-point ``[N, K]``: how much each sample belongs to each class.
            An "attention_mask" among the keyword arguments is the mask of the real tokens.
        metrics: among ``METRICS``; see ``neusemslice.slicing.scores``.
        num_classes: ``K``; by default the number of the model's outputs.
        class_names: ``K`` names; by default "0", "1", ….
        sites: shell patterns of the names of sites to observe; all by default.
        loss: for models whose loss is not the cross-entropy of the logits.
        labels: for batches of another form; takes a batch and returns its labels.
        baseline: what "deeplift" compares with: "zeros", "mean" for the mean of the loader's
            inputs (it is gone through once more, and each rank has its own), or a tensor that
            broadcasts to the first input; token ids where that holds tokens.
        checkpoint: a file that keeps the work so far, written atomically about every half minute.
            If it exists, the sweep continues behind it, and ends with the same bits as one that
            was not interrupted; the loader must give the same batches in the same order. It is
            removed at the end. Each rank needs a file of its own.

    Raises:
        ValueError, TypeError: for an unknown metric, a pattern that matches no site, a loader that
            yields nothing, labels or batches of another form, a model that returns no logits, a
            baseline that does not fit, or a checkpoint of another sweep. For labels out of range,
            naming the batch and the label; where labels are on a GPU, at the next checkpoint or
            the end, with their number.
        NotImplementedError: with "deeplift", for an operation without a rule, naming it and the
            module it is in.
    """
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise ValueError(f"profile: metrics must be among {METRICS}, got {tuple(unknown)}")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module  # the wrapper's forward pass would wait for the other ranks
    device = device_of(model)
    gradients = "taylor" in metrics
    if isinstance(baseline, str) and baseline not in ("zeros", "mean"):
        raise ValueError(f"profile: baseline must be 'zeros', 'mean' or a tensor, got {baseline!r}")
    mean = isinstance(baseline, str) and baseline == "mean"
    if mean and "deeplift" in metrics:
        baseline = _mean(loader, labels)
    loss = loss or _cross_entropy
    profiler: Profiler | None = None
    with (
        ExitStack() as stack,
        # Parameters without the flag get no gradients and hold no activations for them.
        evaluation(model, requires_grad=False if gradients else None),
        torch.set_grad_enabled(gradients),
    ):
        last_saved = time.monotonic()
        seen = 0  # batches in the checkpoint
        saved: dict[str, Tensor] = {}
        for number, (inputs, y) in enumerate(
            batches(track(loader, "profile"), "profile", labels, soft=True)
        ):
            if profiler is None:
                profiler = Profiler(
                    model,
                    inputs.head(2),
                    metrics,
                    num_classes=num_classes,
                    class_names=class_names,
                    sites=sites,
                    baseline=baseline,
                )
                if mean:
                    # Each share of the data has a mean of its own; their profiles can be merged.
                    profiler.profile.baseline = "mean"
                if gradients and loss is _cross_entropy:
                    _check_outputs(profiler.profile)
                stack.enter_context(profiler)
                if checkpoint is not None:
                    seen = _continue(checkpoint, profiler.profile)
                    # Ranks that share a model run it together, so all go back to the one that was
                    # interrupted first, and the others forget what they see twice.
                    profiler.batches = smallest(model, seen)
                    if profiler.batches < seen:
                        saved = copy.deepcopy(profiler.profile.state_dict())
            if number < profiler.batches:
                continue
            with profiler.batch(y, inputs.kwargs.get("attention_mask")):
                output = inputs.to(device).detach().run(model)
                if gradients:
                    total = loss(output, y.to(device, non_blocking=True)).sum()
                    # Unlike autograd.grad, this also goes through reentrant checkpoints.
                    if total.requires_grad:
                        total.backward()
            if number < seen:
                profiler.profile.load_state_dict(saved)
                continue
            if checkpoint is not None and time.monotonic() - last_saved >= CHECKPOINT_SECONDS:
                profiler.check_labels()
                _save(checkpoint, profiler.profile, profiler.batches)
                last_saved = time.monotonic()
    assert profiler is not None
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return profiler.profile


def _mean(loader: Iterable[Any], labels: LabelsOf | None) -> Tensor:
    if iter(loader) is loader:
        raise ValueError("profile: the mean needs a loader that can be gone through twice")
    return mean_input(batches(track(loader, "baseline"), "profile", labels, soft=True))


def _save(path: str | os.PathLike[str], found: Profile, batches_seen: int) -> None:
    tensors, content = found.to_file()
    _files.write(path, "checkpoint", tensors, content | {"batches": batches_seen})


def _continue(path: str | os.PathLike[str], found: Profile) -> int:
    """Fills the empty profile from a checkpoint; returns the number of batches in it."""
    if not Path(path).exists():
        return 0
    saved, batches_seen = _files.read(
        path,
        "checkpoint",
        lambda tensors, content: (Profile.from_file(tensors, content), int(content["batches"])),
    )
    try:
        found.merge(saved)
    except ValueError as error:
        raise ValueError(f"profile: {path} is the checkpoint of another sweep: {error}") from error
    return batches_seen


def _check_outputs(found: Profile) -> None:
    if found.num_classes > found.graph.num_outputs:
        raise ValueError(
            f"profile: the cross-entropy of {found.num_classes} classes is not defined for a model "
            f"with {found.graph.num_outputs} outputs; give the loss"
        )


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    answer = logits_of(output)
    logits, soft = answer.flatten(0, -2), labels.is_floating_point()
    target = labels.to(logits.dtype) if soft else labels.flatten()
    if not soft:
        # Out of range on a GPU: the profiler says so at the end, the loss would end the process.
        target = target.where((target >= 0) & (target < logits.shape[1]), -100)
    if len(logits) != len(target) or (soft and logits.shape != target.shape):
        raise ValueError(
            f"profile: the model answers {list(answer.shape)} to labels {list(labels.shape)}, and "
            "their cross-entropy is not defined; give the loss"
        )
    return F.cross_entropy(logits, target, reduction="sum")
