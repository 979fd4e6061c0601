"""Tensors that carry their baseline with them, and calls of torch functions with such tensors."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

_LINK = "_neusemslice_link"


@dataclass(frozen=True)
class Link:
    """What a tensor is on the baseline's side.

    ``cut`` names the operation that made an integer or a bool of an activation; it is empty for
    what was made of the model's integer input.
    """

    baseline: Tensor
    cut: str = ""


def link_of(tensor: Tensor) -> Link | None:
    """The link of a tensor that depends on the input."""
    return getattr(tensor, _LINK, None)


def tie(tensor: Tensor, link: Link) -> Tensor:
    """The tensor, with its link on it."""
    setattr(tensor, _LINK, link)
    return tensor


def untie(tensor: Tensor) -> None:
    """Makes the tensor a constant."""
    if link_of(tensor) is not None:
        delattr(tensor, _LINK)


def baseline_of(tensor: Tensor) -> Tensor:
    """The tensor on the baseline's side; itself if it does not depend on the input."""
    link = link_of(tensor)
    return tensor if link is None else link.baseline


def substituted(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments of a function with each tensor in them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(substituted(item, change) for item in value)
    if isinstance(value, list):
        return [substituted(item, change) for item in value]
    if isinstance(value, dict):
        return {name: substituted(item, change) for name, item in value.items()}
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in arguments of a function."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    substituted(value, note)
    return found


class _Attach(torch.autograd.Function):
    """Gives a value to a stand-in: the gradient is the stand-in's, times a multiplier."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, standin: Tensor, value: list[Tensor], multiplier: Tensor | None
    ) -> Tensor:
        # The value comes in a list: as a tensor it would be an input, and the output its view.
        if multiplier is not None:
            ctx.save_for_backward(multiplier)
        ctx.dtype = standin.dtype  # type: ignore[attr-defined]
        return value[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        if ctx.saved_tensors:
            gradient = gradient * ctx.saved_tensors[0]
        return gradient.to(ctx.dtype), None, None


def attach(standin: Tensor, value: Tensor, multiplier: Tensor | None = None) -> Tensor:
    """A tensor with a value of its own and the stand-in's gradient, times a multiplier."""
    with torch.enable_grad():
        attached: Tensor = _Attach.apply(standin, [value], multiplier)  # type: ignore[no-untyped-call]
    return attached


def is_foreign(tensor: Tensor) -> bool:
    """Whether a custom autograd function of somebody else made the tensor."""
    node = tensor.grad_fn
    return isinstance(node, BackwardCFunction) and not isinstance(node, _Attach._backward_cls)


@dataclass(frozen=True)
class Call:
    """A call of a torch function.

    Attributes:
        name: without underscores, and without what tells methods, operators and functions apart.
        in_place: whether it changes its first argument.
    """

    func: Callable[..., Any]
    name: str
    in_place: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def paired(self) -> list[Tensor]:
        """The arguments that depend on the input, each once."""
        found = {id(t): t for t in tensors_of((self.args, self.kwargs)) if link_of(t) is not None}
        return list(found.values())

    def run(self, change: Callable[[Tensor], Tensor]) -> Any:
        """The function's value with changed tensors; these are not changed in place."""
        args, kwargs = substituted((self.args, self.kwargs), change)
        if self.in_place:
            args = (args[0].clone(), *args[1:])
        return self.func(*args, **kwargs)

    def values(self) -> tuple[Any, Any]:
        """The function's values for sample and baseline."""
        with torch.no_grad():
            return self.run(Tensor.detach), self.run(baseline_of)


def call_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call of a function that torch handed to a mode."""
    name = getattr(func, "__name__", repr(func))
    if name == "__get__":
        name = func.__self__.__name__  # type: ignore[attr-defined]
    elif isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        space, _, rest = str(func).partition(".")
        name = rest.split(".")[0] if space == "aten" else str(func)
    if not args and "input" in kwargs:
        args = (kwargs["input"],)
        kwargs = {key: value for key, value in kwargs.items() if key != "input"}
    in_place = name in _IN_PLACE
    if name.endswith("_") and not name.endswith("__"):
        name, in_place = name[:-1], True
    return Call(func, _SAME.get(name, name), in_place, args, kwargs)


_IN_PLACE = {
    "__iadd__": "add",
    "__isub__": "sub",
    "__imul__": "mul",
    "__itruediv__": "div",
    "__idiv__": "div",
    "__ipow__": "pow",
    "__setitem__": "setitem",
}

_SAME = _IN_PLACE | {
    "__add__": "add",
    "__radd__": "add",
    "__sub__": "sub",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__truediv__": "div",
    "__div__": "div",
    "__pow__": "pow",
    "__matmul__": "matmul",
    "__neg__": "neg",
    "__pos__": "pos",
    "__abs__": "abs",
    "__getitem__": "getitem",
    "subtract": "sub",
    "multiply": "mul",
    "true_divide": "div",
    "divide": "div",
    "concat": "cat",
    "concatenate": "cat",
    "special_expit": "sigmoid",
    "special_erf": "erf",
    "absolute": "abs",
    "negative": "neg",
    "clip": "clamp",
    "special_softmax": "softmax",
    "special_log_softmax": "log_softmax",
    "special_logsumexp": "logsumexp",
}
"""Other names of the same function."""


@functools.cache
def opened(func: types.FunctionType) -> Callable[..., Any]:
    """A function of torch that runs its body when a mode is active, where its own would not."""

    def no(*_: object) -> bool:
        return False

    def inner(cell: types.CellType) -> types.CellType:
        held = cell.cell_contents
        apart = isinstance(held, types.FunctionType) and held is not func
        return types.CellType(opened(held)) if apart else cell

    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    # torch chooses between some functions by one that closes over them.
    closure = None if func.__closure__ is None else tuple(map(inner, func.__closure__))
    copy = types.FunctionType(
        func.__code__,
        func.__globals__ | dict.fromkeys(names, no),
        func.__name__,
        func.__defaults__,
        closure,
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
