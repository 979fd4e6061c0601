"""Registration of shape inference ("fake kernels"), for torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

_Fake = TypeVar("_Fake", bound=Callable[..., object])


def register_fake(name: str) -> Callable[[_Fake], _Fake]:
    """Registers the decorated function as the fake kernel of ``neusemslice::name``."""
    register = torch.library.register_fake(f"neusemslice::{name}")
    return cast("Callable[[_Fake], _Fake]", register)


def check_one_device(op: str, *arguments: object) -> None:
    """Refuses tensors on several devices, as the kernels do.

    A call with one tensor on the meta device goes to the fake kernel, so it must look as well.

    Raises:
        ValueError: naming the operator and the devices.
    """
    flat = [a for item in arguments for a in (item if isinstance(item, (list, tuple)) else [item])]
    devices = sorted({str(a.device) for a in flat if isinstance(a, Tensor)})
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {' and '.join(devices)}")
