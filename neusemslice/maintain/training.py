"""The training loop that the maintenance tasks share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from neusemslice._progress import length, track
from neusemslice.graph import device_of, logits_of
from neusemslice.profiling import batches


@dataclass(frozen=True)
class Training:
    """What a training run took.

    Attributes:
        steps: optimizer steps.
        seconds: wall time.
        losses: mean loss of each epoch.
        optimizer_bytes: size of the optimizer's state.
    """

    steps: int
    seconds: float
    losses: tuple[float, ...]
    optimizer_bytes: int


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    *,
    what: str,
    freeze_statistics: bool = True,
    classes: Sequence[int] | None = None,
) -> Training:
    """Trains what the optimizer holds, with cross-entropy; the learning rate falls linearly to 0.

    Modes and ``requires_grad`` flags are as before afterwards.

    Args:
        freeze_statistics: keeps every module that has buffers (batch norms) in evaluation mode, so
            that these stay as they are.
        classes: the label that each output of the model stands for; by default its index.

    Raises:
        ValueError: if ``epochs`` is not positive, a label is none of the model's, or the loss is
            not finite.
    """
    if epochs < 1:
        raise ValueError(f"{what}: epochs must be at least 1, got {epochs}")
    wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    losses: list[float] = []
    steps = 0
    begin = time.perf_counter()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        model.train()
        for module, _ in modes:
            if freeze_statistics and any(True for _ in module.buffers(recurse=False)):
                module.eval()
        device = device_of(model)
        # Per step where the loader knows its length, else per epoch.
        steps_per_epoch = length(loader)
        by_step = steps_per_epoch is not None
        total = epochs * (steps_per_epoch or 1)
        scheduler = LambdaLR(optimizer, lambda done: max(0.0, 1 - done / total))
        for epoch in range(epochs):
            summed = torch.zeros((), device=device)
            count = 0
            progress = track(loader, f"{what} {epoch + 1}/{epochs}")
            for inputs, raw in batches(progress, what):
                labels = raw.to(device, non_blocking=True)
                with torch.enable_grad():
                    loss = _loss(logits_of(inputs.to(device).run(model)), labels, classes, what)
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                summed += loss.detach()
                count += 1
                if by_step:
                    scheduler.step()
            if not by_step:
                scheduler.step()
            losses.append(float(summed) / count)
            steps += count
            if not math.isfinite(losses[-1]):
                raise ValueError(f"{what}: the loss of epoch {epoch + 1} is not finite")
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode
    return Training(steps, time.perf_counter() - begin, tuple(losses), state_bytes(optimizer))


def _loss(logits: Tensor, labels: Tensor, classes: Sequence[int] | None, what: str) -> Tensor:
    """Mean cross-entropy of the labelled samples; 0 if there is none."""
    known = range(logits.shape[-1]) if classes is None else classes
    targets = torch.full_like(labels, -100)
    for output, label in enumerate(known):
        targets.masked_fill_(labels == label, output)
    strange = (targets == -100) & (labels != -100)
    if bool(strange.any()):
        found = sorted(set(labels[strange].tolist()))
        raise ValueError(f"{what}: labels must be among {list(known)} or -100, got {found}")
    total = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=-100
    )
    return total / (targets != -100).sum().clamp_min(1)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
