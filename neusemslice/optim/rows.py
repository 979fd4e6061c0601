"""A model of which only some rows of its parameters are trained: gradients are theirs alone.

Each tuned parameter's rows become a parameter of their own, a leaf, registered beside the whole
one, which is frozen and of which the leaf's values are written before anyone reads it. A layer of a
known kind computes its leaf's gradient from tuned rows only. Whatever else reads the parameter, be
it another module or a function, gets the whole one as a function of the leaf: right, at the price
of a whole gradient. This is done by giving the module a class of its own, derived from its own one,
in which the parameter's name is a property; leaving gives it its old class back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from neusemslice.graph import reset_compiler
from neusemslice.graph.sharding import reshard
from neusemslice.optim._row_layers import apply_layer, has_kind, kind_of
from neusemslice.optim._row_norms import Tunable
from neusemslice.optim._rows import as_spread, checked_group


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

    def write(self) -> None:
        """Copies the leaf's values into the parameter; costs what its rows do."""
        if self.leaf is not self.parameter:
            _write(self.parameter, self.neuron_dim, self.rows, self.leaf)


def _write(parameter: Tensor, dim: int, rows: Tensor, leaf: Tensor) -> None:
    # Through `data`, so that the values written anew in each forward pass do not look like a change
    # to the backward pass of the one before. A leaf that did change does: whoever needs its values
    # in a backward pass saves the leaf itself.
    parameter.data.index_copy_(dim, rows, leaf.detach())


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
    the leaf takes its rows. A batch norm with frozen statistics goes back by one product, and keeps
    of its input what tuned rows need.

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
    reshard(model)
    made = RowGradients(_tuned_groups(groups))
    owners = _owners(model)
    _refuse_parameters(model, made.tuned, owners)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
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
        for module in model.modules():
            if module in by_module or _is_frozen_norm(module):
                _install(module, by_module.get(module, {}), stack)
        stack.callback(made.write)
        stack.callback(reshard, model)
        yield made


def _tuned_groups(groups: Iterable[dict[str, Any]]) -> list[_Group]:
    """Options of the groups, and their parameters that have rows to tune, checked."""
    made: list[_Group] = []
    seen: set[int] = set()
    for number, given in enumerate(groups):
        params = given["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if twice := [i for i, p in enumerate(params) if id(p) in seen]:
            raise ValueError(
                f"row_gradients: parameter {twice[0]} of group {number} is in another group as well"
            )
        seen |= {id(p) for p in params}
        all_rows, dims = checked_group(
            "row_gradients", number, params, given.get("rows"), given.get("neuron_dims")
        )
        members = [
            _tuned_parameter(*member)
            for member in zip(params, all_rows, dims, strict=True)
            if len(member[1])
        ]
        made.append(({k: v for k, v in given.items() if k not in _OWN}, members))
    return made


_OWN = ("params", "rows", "neuron_dims")


def _tuned_parameter(parameter: nn.Parameter, rows: Tensor, dim: int) -> TunedParameter:
    whole = not parameter.dim() or len(rows) == parameter.shape[dim]
    if whole or as_spread(parameter) is not None:
        return TunedParameter(parameter, parameter, rows, dim)
    leaf = nn.Parameter(parameter.detach().index_select(dim, rows))
    return TunedParameter(parameter, leaf, rows, dim)


def _is_frozen_norm(module: nn.Module) -> bool:
    """Whether a batch norm is one whose way back, without a tuned row, is ours."""
    if not isinstance(module, _BatchNorm) or not has_kind(module, {}):
        return False
    return module.weight is not None and as_spread(module.weight) is None


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
    members: list[TunedParameter],
    owners: Mapping[int, list[tuple[nn.Module, str]]],
) -> None:
    """Raises for what would train in silence with a wrong gradient, or with none."""
    for member in members:
        if id(member.parameter) not in owners:
            raise ValueError(
                f"row_gradients: a parameter {list(member.parameter.shape)} with "
                f"{len(member.rows)} rows to tune is none of the model's"
            )
    tuned = {id(m.parameter) for m in members if m.leaf is not m.parameter}
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


def _holds(value: object, tuned: set[int]) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    items = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, Tensor) and id(item) in tuned for item in items)


class _Rows:
    """What a module with tuned rows has before its own class."""

    _tuned_rows: dict[str, TunedParameter]
    _parameters: dict[str, nn.Parameter | None]

    def _is_constant(self, name: str) -> bool:
        """Whether a parameter is the frozen one that the block knows, or none of its own.

        It may be replaced for a while (``functional_call``), or its gradient be wanted as well.
        """
        parameter, member = self._parameters.get(name), self._tuned_rows.get(name)
        known = member is None or parameter is member.parameter
        return known and not (parameter is not None and parameter.requires_grad)

    def _write(self, name: str) -> Tensor:
        """Has a constant parameter hold its leaf's values, and gives the leaf, as it is now."""
        member, leaf = self._tuned_rows[name], self._parameters[_leaf_name(name)]
        assert leaf is not None
        _write(member.parameter, member.neuron_dim, member.rows, leaf)
        return leaf

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
            for name, member in self._tuned_rows.items():
                given = cast("nn.Parameter", self._parameters[name])
                if given is not member.parameter:  # assigned instead of copied
                    member.parameter.copy_(given)
                    self._parameters[name] = member.parameter
                member.leaf.copy_(member.parameter.index_select(member.neuron_dim, member.rows))


class _Layer(_Rows):
    """The same for a layer of a known kind."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module = cast("nn.Module", self)
        tuned = self._tuned_rows.get("weight")
        found = None
        if all(self._is_constant(name) for name in ("weight", "bias")):
            found = kind_of(module, x, tuned.neuron_dim if tuned else 0, *args, **kwargs)
        if found is None:
            return cast("Tensor", super().forward(x, *args, **kwargs))  # type: ignore[misc]
        weight = self._written("weight")
        assert weight is not None
        return apply_layer(*found, weight, self._written("bias"))

    def _written(self, name: str) -> Tunable | None:
        """A constant parameter that holds its leaf's values; ``None`` if the layer has none."""
        constant = self._parameters.get(name)
        if constant is None or name not in self._tuned_rows:
            return None if constant is None else Tunable(constant)
        return Tunable(constant, self._write(name), self._tuned_rows[name].rows)


def _leaf_name(name: str) -> str:
    return f"{name}_rows"


def _whole(name: str) -> property:
    """The property that stands for a tuned parameter: a function of its leaf."""

    def get(self: _Rows) -> Tensor:
        member = self._tuned_rows[name]
        where = (member.neuron_dim, member.rows)
        if not self._is_constant(name):
            # Then it is a function of both, with no gradient in the tuned rows.
            leaf, parameter = self._parameters[_leaf_name(name)], self._parameters[name]
            return cast("Tensor", parameter).index_copy(*where, cast("Tensor", leaf))
        written: Tensor = _Written.apply(  # type: ignore[no-untyped-call]
            self._write(name), member.parameter, *where
        )
        return written

    return property(get)


class _Written(torch.autograd.Function):
    """The whole parameter, which holds the leaf's values, as a function of the leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, parameter: Tensor, dim: int, rows: Tensor) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(leaf, rows)
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, rows = ctx.saved_tensors  # raises if the leaf has changed since
        return grad.index_select(ctx.dim, rows), None, None, None


def _install(module: nn.Module, members: dict[str, TunedParameter], stack: ExitStack) -> None:
    """Gives a module its leaves and a class that reads them, until the stack is unwound."""
    weight, bias = members.get("weight"), members.get("bias")
    if weight is not None and bias is not None and torch.equal(weight.rows, bias.rows):
        members = members | {"bias": replace(bias, rows=weight.rows)}  # the layer sees they are one
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
