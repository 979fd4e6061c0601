"""The training loop that the maintenance tasks share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from neusemslice._progress import length, track
from neusemslice.graph import Inputs, device_of, evaluation, logits_of
from neusemslice.profiling import batches


@dataclass(frozen=True)
class Training:
    """What a training run took.

    Attributes:
        steps: optimizer steps.
        seconds: wall time of the steps and of loading their batches.
        losses: mean loss of each epoch.
        optimizer_bytes: size of the optimizer's state.
    """

    steps: int
    seconds: float
    losses: tuple[float, ...]
    optimizer_bytes: int

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds if self.seconds > 0 else 0.0


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        batches: how many of the current epoch's are done.
        summed: their losses.
        steps, seconds, losses: as in ``Training``, so far.
    """

    batches: int = 0
    summed: Tensor = field(default_factory=lambda: torch.zeros(()))
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


Loss = Callable[[Inputs, Tensor, Tensor], Tensor]
"""From a batch's inputs, logits and labels to the sum of the labelled samples' losses, a scalar."""


class Watcher:
    """What ``fit`` tells of itself, and where it begins; this one lets it run.

    A run that begins at a position in the middle of an epoch passes over the batches before it.
    """

    def __init__(self) -> None:
        self.at = Position()

    def epoch_begins(self) -> None:
        """Before the loaders are asked for an epoch's batches."""

    def passed_over(self) -> None:
        """After the last batch that was passed over."""

    def stepped(self) -> None:
        """After each step."""

    def epoch_ended(self) -> bool:
        """After each epoch; whether the run goes on."""
        return True


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    *,
    what: str,
    freeze_statistics: bool = True,
    moving: Collection[nn.Module] = (),
    classes: Sequence[int] | None = None,
    along: Iterable[Any] | None = None,
    loss: Loss | None = None,
    watcher: Watcher | None = None,
) -> Training:
    """Trains what the optimizer holds; the learning rate falls linearly to 0.

    Modes and ``requires_grad`` flags are as before afterwards.

    Args:
        freeze_statistics: keeps every module that has buffers (batch norms) in evaluation mode, so
            that these stay as they are.
        moving: batch norms whose running statistics move all the same. A batch with one value per
            channel, which has no variance, leaves them as they are.
        classes: the label that each output of the model stands for; by default its index.
        along: a second loader. Each batch of the first is one with a batch of this, which begins
            anew with each epoch and where it ends.
        loss: by default cross-entropy.
        watcher: what is told of the run.

    Raises:
        ValueError: if ``epochs`` is not positive, a label is none of the model's, or the loss or
            what is trained is not finite at an epoch's end.
    """
    if epochs < 1:
        raise ValueError(f"{what}: epochs must be at least 1, got {epochs}")
    watcher = watcher or Watcher()

    def cross_entropy(_: Inputs, logits: Tensor, labels: Tensor) -> Tensor:
        return summed_cross_entropy(logits, labels, classes, what)

    loss = loss or cross_entropy
    at = watcher.at
    device = device_of(model)
    # Per step where the loader knows its length, else per epoch.
    steps_per_epoch = length(loader)
    by_step = steps_per_epoch is not None
    total = epochs * (steps_per_epoch or 1)
    start = at.steps if by_step else len(at.losses)
    scheduler = LambdaLR(optimizer, lambda done: max(0.0, 1 - (start + done) / total))
    with _training(model, optimizer, freeze_statistics, moving):
        while len(at.losses) < epochs:
            epoch = len(at.losses) + 1
            watcher.epoch_begins()
            progress = track(loader, f"{what} {epoch}/{epochs}", steps_per_epoch)
            begin = time.perf_counter()
            for number, parts in enumerate(_joined(progress, along, what), 1):
                if number <= at.batches:
                    if number == at.batches:
                        watcher.passed_over()
                        begin = time.perf_counter()
                    continue
                optimizer.zero_grad()
                mean = _backward(model, parts, device, loss)
                optimizer.step()
                if by_step:
                    scheduler.step()
                at.summed = at.summed.to(device) + mean
                at.batches, at.steps = number, at.steps + 1
                at.seconds += time.perf_counter() - begin
                watcher.stepped()
                begin = time.perf_counter()
            if not by_step:
                scheduler.step()
            at.losses.append(float(at.summed) / at.batches)
            at.batches, at.summed = 0, torch.zeros(())
            if not math.isfinite(at.losses[-1]):
                raise ValueError(f"{what}: the loss of epoch {epoch} is not finite")
            if not _is_finite(optimizer):
                raise ValueError(
                    f"{what}: epoch {epoch} gave weights that are not finite; lower lr"
                )
            if not watcher.epoch_ended():
                break
    return Training(at.steps, at.seconds, tuple(at.losses), state_bytes(optimizer))


def _is_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Whether everything that it trains is: the last step's gradients show in no loss."""
    return all(bool(p.isfinite().all()) for g in optimizer.param_groups for p in g["params"])


@contextmanager
def _training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    freeze_statistics: bool,
    moving: Collection[nn.Module],
) -> Iterator[None]:
    """Inside the block the model is one that trains what the optimizer holds."""
    wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    move = partial(_move_where_possible, model)
    hooks = [norm.register_forward_pre_hook(move) for norm in moving]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        model.train()
        for module, _ in modes:
            if freeze_statistics and any(True for _ in module.buffers(recurse=False)):
                module.eval()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


def _move_where_possible(model: nn.Module, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Not while the model is scored between epochs."""
    norm.train(model.training and args[0].numel() > args[0].shape[1])


def _joined(
    loader: Iterable[Any], along: Iterable[Any] | None, what: str
) -> Iterator[list[tuple[Inputs, Tensor]]]:
    """Each batch of the loader, with one of the other where there is another."""
    others: Iterator[tuple[Inputs, Tensor]] = iter(())
    for batch in batches(loader, what):
        parts = [batch]
        if along is not None:
            if (other := next(others, None)) is None:
                others = batches(along, what)
                other = next(others)
            parts.append(other)
        yield parts


def _backward(
    model: nn.Module,
    parts: list[tuple[Inputs, Tensor]],
    device: torch.device,
    summed: Loss,
) -> Tensor:
    """Gradients of the mean loss over the labelled samples of all parts; returns that loss."""
    labels = [raw.to(device, non_blocking=True) for _, raw in parts]
    count = sum((y != -100).sum() for y in labels).clamp_min(1)  # type: ignore[union-attr]
    total = torch.zeros((), device=device)
    with torch.enable_grad():
        for (inputs, _), y in zip(parts, labels, strict=True):
            inputs = inputs.to(device)
            loss = summed(inputs, logits_of(inputs.run(model)), y) / count
            loss.backward()
            total += loss.detach()
    return total


def summed_cross_entropy(
    logits: Tensor, labels: Tensor, classes: Sequence[int] | None, what: str
) -> Tensor:
    """Cross-entropy, summed over the labelled samples; 0 if there is none.

    Raises:
        ValueError: for a label that is none of the model's.
    """
    known = range(logits.shape[-1]) if classes is None else classes
    targets = torch.full_like(labels, -100)
    for output, label in enumerate(known):
        targets.masked_fill_(labels == label, output)
    strange = (targets == -100) & (labels != -100)
    if bool(strange.any()):
        found = sorted(set(labels[strange].tolist()))
        raise ValueError(f"{what}: labels must be among {list(known)} or -100, got {found}")
    return F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=-100
    )


@dataclass(frozen=True)
class Score:
    """How well a model answers.

    Attributes:
        accuracy: share of the labelled samples (tokens) whose largest logit is the label's.
        loss: their mean cross-entropy.
        samples: how many there are.
    """

    accuracy: float
    loss: float
    samples: int


@torch.no_grad()
def score(model: nn.Module, loader: Iterable[Any], what: str) -> Score:
    """Scores a model in evaluation mode.

    Raises:
        ValueError: if the loader has no labelled sample, or labels that the model does not have.
    """
    device = device_of(model)
    right, samples = torch.zeros(2, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with evaluation(model):
        for inputs, raw in batches(track(loader, f"{what}: score"), what):
            labels = raw.to(device, non_blocking=True)
            logits = logits_of(inputs.to(device).run(model))
            loss += summed_cross_entropy(logits, labels, None, what)
            right += (logits.argmax(-1) == labels).sum()
            samples += (labels != -100).sum()
    count = int(samples)
    if not count:
        raise ValueError(f"{what}: there is no labelled sample to score the model with")
    return Score(int(right) / count, float(loss) / count, count)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
