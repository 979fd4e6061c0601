"""Running statistics of batch norms, computed anew from other samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from neusemslice._progress import track
from neusemslice.graph import device_of, evaluation
from neusemslice.profiling import batches


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Iterable[Any]) -> None:
    """Replaces the running mean and variance of every batch norm, in place, in one pass.

    Each becomes the mean, over the loader's batches, of the batch's own mean and unbiased variance.
    Batch norms normalise by the batch meanwhile, all else runs in evaluation mode. Counts of
    batches, modes and settings are left alone.

    Raises:
        ValueError: if the loader yields nothing, or a batch with one value per channel; nothing has
            changed then.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    before = [{name: b.clone() for name, b in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    device = device_of(model)
    with evaluation(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.train()
            for inputs, _ in batches(track(loader, "recalibrate"), "recalibrate"):
                inputs.to(device).run(model)
            for buffers in before:
                del buffers["running_mean"], buffers["running_var"]
        finally:
            for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                norm.load_state_dict(buffers, strict=False)
