"""A device that is not the CPU, where there is none: for finding code that mixes devices.

Its tensors are torch's, with a device of their own; their values lie in tensors on the CPU, which
do the work. What a CUDA tensor refuses, these refuse as well: operators that read tensors of both
devices, apart from copies, indices and single numbers. A process that has the device is another to
torch than one without, so tests on it run in a process of their own.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretended"
aten = torch.ops.aten
_TRANSFERS = {aten._to_copy.default, aten.copy_.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_NO_NUMBERS = {aten.stack.default, aten.cat.default, aten.equal.default}
"""Operators that refuse a number of another device too."""
_MAKERS = [aten.empty.memory_format, aten.empty_strided.default]
_MAKERS += [aten.arange.default, aten.arange.start, aten.arange.start_step]
"""Operators that make a tensor out of none; others are made of them."""
_LIBRARY = torch.library.Library("aten", "IMPL")


@functools.cache
def pretended() -> torch.device:
    """The device, which this process has from now on; called before any backward pass."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    for make in _MAKERS:
        _LIBRARY.impl(make, functools.partial(_made, make), "PrivateUse1")
    _LIBRARY.impl(aten._copy_from.default, _copy_from, "PrivateUse1")
    return torch.device(NAME, 0)


def _made(make: Any, *args: Any, **kwargs: Any) -> Tensor:
    return Apart(make(*args, **{**kwargs, "device": "cpu"}))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _values(target).copy_(_values(source))
    return target


class Apart(Tensor):
    """A tensor on the device; `values` is a tensor on the CPU."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "Apart":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        layout |= {"dtype": values.dtype, "device": pretended()}
        made = Tensor._make_wrapper_subclass(cls, values.size(), **layout)
        made.values = values
        return made

    @property
    def data(self) -> Tensor:
        return Apart(self.values)

    @data.setter
    def data(self, other: "Apart") -> None:
        Tensor.data.__set__(self, other)
        self.values = other.values

    def tolist(self) -> Any:
        return self.values.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Apart({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        apart = [t for t in given if isinstance(t, Apart)]
        _refuse_mixed(func, args, given, apart)
        device = torch.device(kwargs["device"] or "cpu") if "device" in kwargs else apart[0].device
        if device.type == NAME:
            kwargs = {k: "cpu" if k == "device" else v for k, v in kwargs.items()}
        result = func(*_values(args), **_values(kwargs))
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():  # the shape that the tensor on the device says it has
                func(*args, **kwargs)
        if any(t.shape != t.values.shape for t in apart):
            raise NotImplementedError(f"{func} resized a tensor on {NAME}")
        if func.namespace == "neusemslice":
            # torch's own operators do it before they come here.
            torch.autograd.graph.increment_version(_written(func, args))
        if device.type != NAME:
            return result
        same = {id(t.values if isinstance(t, Apart) else t): t for t in given}
        return tree_map_only(Tensor, lambda t: same[id(t)] if id(t) in same else Apart(t), result)


def _values(given: Any) -> Any:
    return tree_map_only(Apart, lambda t: t.values, given)


def _written(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """What an operator writes into."""
    pairs = zip(args, (a.alias_info for a in func._schema.arguments), strict=False)
    written = [x for x, alias in pairs if alias and alias.is_write]
    return [t for t in tree_leaves(written) if isinstance(t, Apart)]


def _refuse_mixed(func: Any, args: Any, given: list[Tensor], apart: list[Tensor]) -> None:
    """Refuses what a CUDA tensor refuses."""
    indexed = func in _INDEXED and isinstance(args[0], Apart)
    near = [t for t in (args[2:3] if indexed else given) if not isinstance(t, Apart)]
    mixed = [list(t.shape) for t in near if t.ndim or func in _NO_NUMBERS]
    if mixed and func not in _TRANSFERS:
        raise RuntimeError(f"{func} mixes devices: {len(apart)} on {NAME}, {mixed} on the CPU")
