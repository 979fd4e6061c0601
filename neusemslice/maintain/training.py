"""The training loop that the maintenance tasks share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from neusemslice._progress import track
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
    map_labels: Callable[[Tensor], Tensor] | None = None,
) -> Training:
    """Trains what the optimizer holds, with cross-entropy; the learning rate falls linearly to 0.

    Modes and ``requires_grad`` flags are as before afterwards.

    Args:
        freeze_statistics: keeps running statistics of batch norms as they are, and uses them.
        map_labels: takes a batch's labels to the indices of the model's outputs.

    Raises:
        ValueError: if ``epochs`` is not positive, or the loss is not finite.
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
            if freeze_statistics and isinstance(module, _BatchNorm):
                module.eval()
        device = device_of(model)
        # Per step where the loader knows its length, else per epoch.
        by_step = isinstance(loader, Sized)
        total = epochs * len(loader) if isinstance(loader, Sized) else epochs
        scheduler = LambdaLR(optimizer, lambda done: 1 - done / total)
        for epoch in range(epochs):
            summed = torch.zeros((), device=device)
            count = 0
            progress = track(loader, f"{what} {epoch + 1}/{epochs}")
            for inputs, labels in batches(progress, what, device):
                targets = labels if map_labels is None else map_labels(labels)
                loss = F.cross_entropy(logits_of(inputs.run(model)), targets)
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


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
