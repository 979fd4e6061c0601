"""Running a model as a graph needs it: its batches, its answer, its structure, its modes."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.graph.sharding import reshard


@dataclass(frozen=True)
class Inputs:
    """What a model is called with; tuples, lists and mappings may be nested in it."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module) -> Any:
        """The model's output."""
        return model(*self.args, **self.kwargs)

    def to(self, device: torch.device) -> Inputs:
        """The same with every tensor on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def detach(self) -> Inputs:
        """The same apart from any graph of autograd."""
        return self.map(torch.Tensor.detach)

    @property
    def samples(self) -> int:
        """Size of the batch: that of the first tensor with a dimension."""
        return next((t.shape[0] for t in tensors_in([*self.args, self.kwargs]) if t.ndim), 0)

    def head(self, samples: int) -> Inputs:
        """The first ``samples`` of the batch."""
        return self.take(slice(samples))

    def take(self, samples: slice | Tensor) -> Inputs:
        """Some samples of the batch, by a slice, indices or a bool mask."""
        size = self.samples

        def cut(tensor: Tensor) -> Tensor:
            return tensor[samples] if tensor.ndim and tensor.shape[0] == size else tensor

        return self.map(cut)

    def copy(self) -> Inputs:
        """The same in tensors of its own, which a model that writes into its input leaves alone."""
        return self.map(torch.clone)

    def normal(self) -> Inputs:
        """The same without tensors of inference mode, which autograd refuses; call it outside."""
        return self.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with each tensor changed."""
        return Inputs(
            tuple(_mapped(a, change) for a in self.args),
            {name: _mapped(value, change) for name, value in self.kwargs.items()},
        )


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with each of its tensors changed; its containers keep their types."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)
        for name, item in value.items():
            changed[name] = _mapped(item, change)
        return changed
    if isinstance(value, Mapping):
        return {name: _mapped(item, change) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(item, change) for item in value)
    return value


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
    """Whether the model or a part of it goes through ``torch.compile``."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


def reset_compiler() -> None:
    """Has compiled code notice that hooks came or went; it inlines those it finds.

    ``torch.compile(model)`` leaves no trace in the model itself, so everything that this process
    has compiled is compiled anew when it is called next.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def uncompiled() -> AbstractContextManager[object]:
    """Inside the block, compiled modules run as they were written."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``.

    The names of its modules and parameters are those that the user knows.
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def evaluation(model: nn.Module, *, requires_grad: bool | None = None) -> Iterator[None]:
    """Evaluation mode inside the block; each module's own mode comes back after it.

    With ``requires_grad`` every floating-point parameter has that flag inside the block.
    """
    reshard(model)
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
        reshard(model)
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
