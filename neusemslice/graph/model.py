"""Running a model as a graph needs it: its batches, its answer, its structure, its modes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Inputs:
    """What a model is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module) -> Any:
        """The model's output."""
        return model(*self.args, **self.kwargs)

    def to(self, device: torch.device) -> Inputs:
        """The same with every tensor on ``device``."""

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return Inputs(
            tuple(move(a) for a in self.args), {k: move(v) for k, v in self.kwargs.items()}
        )

    @property
    def samples(self) -> int:
        """Size of the batch: that of the first tensor."""
        tensors = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]
        return tensors[0].shape[0] if tensors and tensors[0].ndim else 0

    def head(self, samples: int) -> Inputs:
        """The first ``samples`` of the batch."""
        size = self.samples

        def cut(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
            return value[:samples] if batched else value

        return Inputs(tuple(cut(a) for a in self.args), {k: cut(v) for k, v in self.kwargs.items()})


def logits_of(output: Any) -> Tensor:
    """The tensor ``[..., K]`` in what a model returned: itself, its ``.logits``, or its first item.

    Raises:
        TypeError: if there is none.
    """
    answer = output
    if hasattr(answer, "logits"):
        answer = answer.logits
    elif isinstance(answer, (tuple, list)) and answer:
        answer = answer[0]
    if not isinstance(answer, Tensor) or answer.ndim < 2:
        got = f"{type(output).__name__}"
        if isinstance(answer, Tensor):
            got = f"a tensor of shape {list(answer.shape)}"
        raise TypeError(f"the model must return logits [N, ..., K] or have .logits, got {got}")
    return answer


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors in what a model returned, in the order of its tuples, lists and mappings."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in tensors_in(item)]
    return []


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def fingerprint(model: nn.Module) -> str:
    """Hex digest of the structure: name and shape of every parameter and buffer.

    Two models of equal structure with other weights, or weights of another dtype, have the same
    fingerprint, so that a slice outlives training and conversion.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{list(tensor.shape)};".encode())
    return digest.hexdigest()[:32]


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it goes through ``torch.compile``.

    Compiled code does not notice hooks that come or go, unless the compiler is reset.
    """
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


@contextmanager
def evaluation(model: nn.Module, *, requires_grad: bool | None = None) -> Iterator[None]:
    """Evaluation mode inside the block; each module's own mode comes back after it.

    With ``requires_grad`` every floating-point parameter has that flag inside the block.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        if requires_grad is not None:
            for parameter, _ in flags:
                if parameter.is_floating_point():
                    parameter.requires_grad_(requires_grad)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
