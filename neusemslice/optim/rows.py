"""A model of which only some rows of its parameters are trained: gradients are theirs alone.

Each tuned parameter's rows become a parameter of their own, a leaf, registered beside the whole
one, which is frozen and of which the leaf's values are written before anyone reads it. A layer of a
known kind computes its leaf's gradient from tuned rows only. Whatever else reads the parameter, be
it another module or a function, gets the whole one as a function of the leaf: right, at the price
of a whole gradient. This is done by giving the module a class of its own, derived from its own one,
in which the parameter's name is a property; leaving gives it its old class back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from neusemslice.graph import reset_compiler
from neusemslice.optim._masked import MaskedOptimizer
from neusemslice.optim._row_layers import apply_layer, has_kind, kind_of


@dataclass(frozen=True)
class TunedParameter:
    """A parameter with the rows that are trained.

    Attributes:
        parameter: the whole one.
        leaf: what is trained: its rows, of its shape with their number along ``neuron_dim``; the
            parameter itself where it is trained whole or spread over ranks.
        rows: int64 ``[R]``, rising.
        neuron_dim: the dimension of ``parameter`` that the rows are along.
    """

    parameter: nn.Parameter
    leaf: nn.Parameter
    rows: Tensor
    neuron_dim: int

    @torch.no_grad()
    def write(self) -> None:
        """Copies the leaf's values into the parameter; costs what its rows do."""
        if self.leaf is not self.parameter:
            # Through `data`, so that the values written anew in each forward pass do not look like
            # a change to the backward pass of the one before. A leaf that did change does: whoever
            # needs its values in a backward pass saves the leaf itself.
            self.parameter.data.index_copy_(self.neuron_dim, self.rows, self.leaf.detach())


_Group: TypeAlias = tuple[dict[str, Any], list[TunedParameter]]
"""Options, and the tuned parameters that they are for."""


class RowGradients:
    """What is trained inside a block of ``row_gradients``."""

    def __init__(self, groups: list[_Group]) -> None:
        self._groups = groups

    @property
    def tuned(self) -> list[TunedParameter]:
        """All tuned parameters, in the order in which they were given."""
        return [member for _, members in self._groups for member in members]

    def parameters(self) -> list[nn.Parameter]:
        """The leaves, for an optimizer or ``clip_grad_norm_``."""
        return [member.leaf for member in self.tuned]

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for any optimizer, with the options of those that were given.

        A leaf is trained whole. ``rows`` and ``neuron_dims``, which the masked optimizers know, are
        given for groups with parameters spread over ranks, whose gradients are whole.
        """
        made = []
        for options, members in self._groups:
            group = options | {"params": [member.leaf for member in members]}
            whole = [member.leaf is member.parameter for member in members]
            if any(whole):
                group["rows"] = [
                    m.rows if w else torch.arange(len(m.rows), device=m.rows.device)
                    for m, w in zip(members, whole, strict=True)
                ]
                group["neuron_dims"] = [member.neuron_dim for member in members]
            made.append(group)
        return made

    def write(self) -> None:
        """Has the whole parameters hold what the leaves do; a forward pass does so by itself."""
        for member in self.tuned:
            member.write()


@contextmanager
def row_gradients(model: nn.Module, groups: Iterable[dict[str, Any]]) -> Iterator[RowGradients]:
    """Inside the block only the given rows of the model's parameters are trained.

    ``with row_gradients(model, slice.parameters(model)) as tuned:`` the tuned rows of each
    parameter are a parameter of their own with a gradient of their own size, ``tuned.groups()``
    feeds any optimizer, and every other parameter is frozen, so what lies below the lowest tuned
    layer has no backward pass. The leaves are parameters of the model, named ``weight_rows`` for
    ``weight``: wrap it in ``DistributedDataParallel`` inside the block. Linear layers,
    convolutions, transposed ones and embeddings compute gradients of tuned rows only; other
    modules, and functions that read a tuned parameter of a module, compute a whole one, of which
    the leaf takes its rows.

    ``state_dict`` and ``load_state_dict`` are those of the plain model. On leaving, also by an
    error, the parameters hold the trained rows, and everything else is as it was: classes, flags,
    registered names, hooks. Compiled code would not notice, so the compiler is reset on entering
    and leaving.

    Parameters that ``fully_shard`` has spread over ranks are trained as they are: their gradients
    stay whole, and ``tuned.groups()`` names the rows for the masked optimizers.

    Args:
        model: the model; on the device that it will be trained on.
        groups: as ``Slice.parameters`` gives them, and as ``MaskedAdamW`` takes them; further
            options are kept. A parameter without rows is frozen.

    Raises:
        TypeError: for a parameter or rows of a wrong dtype.
        ValueError: for rows that do not fit, a parameter that is not the model's or is read where
            the block does not see it, or a model that is in such a block already. Nothing has
            changed then.
    """
    _refuse_model(model)
    given = list(groups)
    checked = _CheckedGroups(given).param_groups
    owners = _owners(model)
    _refuse_parameters(model, checked, owners)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    made = RowGradients([_tuned_group(*both) for both in zip(given, checked, strict=True)])
    with ExitStack() as stack:
        reset_compiler()
        stack.callback(reset_compiler)
        for parameter, flag in flags:
            stack.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        for member in made.tuned:
            member.leaf.requires_grad_(True)
        by_module: dict[nn.Module, dict[str, TunedParameter]] = {}
        for member in made.tuned:
            if member.leaf is not member.parameter:
                for module, name in owners[id(member.parameter)]:
                    by_module.setdefault(module, {})[name] = member
        for module, members in by_module.items():
            _install(module, members, stack)
        stack.callback(made.write)
        yield made


class _CheckedGroups(MaskedOptimizer):
    """Groups with complete and checked rows and neuron dimensions, as the optimizers have them."""

    _name = "row_gradients"

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__([dict(group) for group in groups], {"lr": 0.0, "weight_decay": 0.0})


_OWN = ("params", "rows", "neuron_dims")


def _tuned_group(given: dict[str, Any], checked: dict[str, Any]) -> _Group:
    """A group's options, and its parameters that have rows to tune."""
    members = []
    for parameter, rows, dim in zip(*(checked[name] for name in _OWN), strict=True):
        if len(rows):
            whole = not parameter.dim() or len(rows) == parameter.shape[dim]
            leaf = parameter
            if not whole and not _is_sharded(parameter):
                leaf = nn.Parameter(parameter.detach().index_select(dim, rows))
            members.append(TunedParameter(parameter, leaf, rows, dim))
    return {k: v for k, v in given.items() if k not in _OWN}, members


def _is_sharded(parameter: Tensor) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")  # cannot be without having been imported
    return tensors is not None and isinstance(parameter, tensors.DTensor)


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Which modules have a parameter, and under which name; by the parameter's id."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    return owners


def _refuse_model(model: nn.Module) -> None:
    """Raises for a model that cannot be entered."""
    for name, module in model.named_modules():
        if isinstance(module, _Rows):
            raise ValueError(f"row_gradients: {name or 'the model'} is in such a block already")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "row_gradients: DistributedDataParallel knows the parameters that it was made "
                "with; give the model in it, and wrap that inside the block"
            )


def _refuse_parameters(
    model: nn.Module,
    groups: list[dict[str, Any]],
    owners: Mapping[int, list[tuple[nn.Module, str]]],
) -> None:
    """Raises for what would train in silence with a wrong gradient, or with none."""
    tuned = {}
    for number, group in enumerate(groups):
        for index, (parameter, rows) in enumerate(zip(group["params"], group["rows"], strict=True)):
            if id(parameter) not in owners:
                raise ValueError(
                    f"row_gradients: parameter {index} of group {number}, "
                    f"{list(parameter.shape)}, is none of the model's"
                )
            if len(rows) and not _is_sharded(parameter):
                tuned[id(parameter)] = parameter
    for name, module in model.named_modules():
        for place, value in module.__dict__.items():
            if place not in ("_parameters", "_modules", "_buffers") and _holds(value, tuned):
                raise ValueError(
                    f"row_gradients: {name or 'the model'} ({type(module).__name__}) also keeps a "
                    f"tuned parameter in its attribute {place!r}, where its rows cannot be trained"
                )
        changes = (
            isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
        )
        if changes and id(module.weight) in tuned:
            raise ValueError(
                f"row_gradients: {name} is an embedding with max_norm, which changes rows that are "
                f"not tuned"
            )


def _holds(value: object, tuned: Mapping[int, Tensor]) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    items = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, Tensor) and id(item) in tuned for item in items)


class _Rows:
    """What a module with tuned rows has before its own class."""

    _tuned_rows: dict[str, TunedParameter]
    _parameters: dict[str, nn.Parameter | None]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for member in self._tuned_rows.values():
            member.write()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name in self._tuned_rows:
            del destination[prefix + _leaf_name(name)]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing, *others
        )
        own = {prefix + _leaf_name(name) for name in self._tuned_rows}
        missing_keys += [key for key in missing if key not in own]
        with torch.no_grad():
            for member in self._tuned_rows.values():
                chosen = member.parameter.index_select(member.neuron_dim, member.rows)
                member.leaf.copy_(chosen)


class _Layer(_Rows):
    """The same for a layer of a known kind."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module = cast("nn.Module", self)
        weight, bias = self._parameters["weight"], self._parameters.get("bias")
        tuned, tuned_bias = self._tuned_rows.get("weight"), self._tuned_rows.get("bias")
        found = None
        if not any(p is not None and p.requires_grad for p in (weight, bias)):
            found = kind_of(module, x, tuned.neuron_dim if tuned else 0, *args, **kwargs)
        if found is None:
            return cast("Tensor", super().forward(x, *args, **kwargs))  # type: ignore[misc]
        for member in self._tuned_rows.values():
            member.write()
        kind, x = found
        assert weight is not None
        return apply_layer(
            kind,
            x,
            weight,
            bias,
            tuned.leaf if tuned else None,
            tuned.rows if tuned else None,
            tuned_bias.leaf if tuned_bias else None,
            tuned_bias.rows if tuned_bias else None,
        )


def _leaf_name(name: str) -> str:
    return f"{name}_rows"


def _whole(name: str) -> property:
    """The property that stands for a tuned parameter: a function of its leaf."""

    def get(self: _Rows) -> Tensor:
        member, parameter = self._tuned_rows[name], self._parameters[name]
        assert parameter is not None
        if parameter.requires_grad:
            # Someone wants its gradient as well, which then must not be that of the tuned rows.
            return parameter.index_copy(member.neuron_dim, member.rows, member.leaf)
        member.write()
        written: Tensor = _Written.apply(  # type: ignore[no-untyped-call]
            member.leaf, parameter, member.rows, member.neuron_dim
        )
        return written

    return property(get)


class _Written(torch.autograd.Function):
    """The whole parameter, which holds the leaf's values, as a function of the leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, parameter: Tensor, rows: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(leaf, rows)
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, rows = ctx.saved_tensors  # raises if the leaf has changed since
        return grad.index_select(ctx.dim, rows), None, None, None


def _install(module: nn.Module, members: dict[str, TunedParameter], stack: ExitStack) -> None:
    """Gives a module its leaves and a class that reads them, until the stack is unwound."""
    own = type(module)
    known = has_kind(module, {name: member.neuron_dim for name, member in members.items()})
    described = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    derived = type(
        own.__name__,
        (_Layer if known else _Rows, own),
        described | {name: _whole(name) for name in members},
    )
    for name, member in members.items():
        module.register_parameter(_leaf_name(name), member.leaf)
        stack.callback(module._parameters.pop, _leaf_name(name))
    module._tuned_rows = members  # type: ignore[assignment]
    stack.callback(module.__dict__.pop, "_tuned_rows")
    module.__class__ = derived
    stack.callback(setattr, module, "__class__", own)
