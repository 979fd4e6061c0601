"""Mixed precision, for networks that are trained often."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def mixed(model: M) -> M:
    """The network itself, which from now on computes in bfloat16 where gradients are recorded, and
    keeps channels last; it answers in float32."""
    kind = type(model)

    def forward(self: M, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_grad_enabled()):
            return kind.forward(self, *args, **kwargs).float()

    model.__class__ = type(f"Mixed{kind.__name__}", (kind,), {"forward": forward})
    return model.to(memory_format=torch.channels_last)
