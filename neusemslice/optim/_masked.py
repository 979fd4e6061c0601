"""What the masked optimizers share: groups with rows, compact state, saving and loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

Rows: TypeAlias = Tensor | Sequence[int] | Sequence[bool]
"""Tuned rows: rising indices (int64), or a bool mask over the neuron dimension."""

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class OperatorCall:
    """The arguments of one operator call: the parameters of one group on one device."""

    lr: Tensor
    grad_scale: Tensor | None
    found_inf: Tensor | None
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)
    steps: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    neuron_dims: list[int] = field(default_factory=list)


class MaskedOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups name the rows to tune, and whose state is that of those rows.

    A subclass says which state its options need, and how to call its operator.
    """

    # GradScaler then leaves unscaling and skipping to `step`, through the attributes `grad_scale`
    # and `found_inf`. On the class, so that copies and unpickled optimizers have it too.
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        lr = defaults["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{self._name}: lr must have one element, got {list(lr.shape)}")
        for name in ("lr", "weight_decay"):
            if not defaults[name] >= 0:
                raise ValueError(f"{self._name}: {name} must be at least 0, got {defaults[name]}")
        super().__init__(params, defaults)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state, beside the number of steps, that a group's options need."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], call: OperatorCall) -> None:
        """Calls the operator."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group ``{"params": [...], "rows": [...], "neuron_dims": [...], ...}``.

        Without ``rows`` its parameters are tuned whole; without ``neuron_dims`` all are 0. The
        dictionary itself is not changed.

        Raises:
            TypeError: for a parameter or rows of a wrong dtype.
            ValueError: naming the parameter, if its rows or its neuron dimension do not fit it.
                Nothing has been added then.
        """
        number = len(self.param_groups)
        super().add_param_group(dict(param_group) if isinstance(param_group, dict) else param_group)
        group = self.param_groups[-1]
        try:
            group["rows"], group["neuron_dims"] = self._complete(
                number, group["params"], group.get("rows"), group.get("neuron_dims")
            )
        except Exception:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the tuned rows of all parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            What the closure returned.

        Raises:
            ValueError: for a sparse gradient. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse_gradients()
        for group in self.param_groups:
            for call in self._calls(group):
                self._update(group, call)
        return loss

    @torch.no_grad()
    def set_rows(self, parameter: Tensor, rows: Rows) -> None:
        """Changes which rows of a parameter are tuned.

        Rows tuned before and after keep their state. New rows start as fresh ones, with a step
        number of 0. Rows that are no longer tuned lose their state, and start anew if they come
        back. A captured CUDA graph must be captured again.

        Raises:
            TypeError: for rows of a wrong dtype.
            ValueError: if the parameter is none of this optimizer's, or the rows do not fit it.
                Nothing has changed then.
        """
        number, index = self._find(parameter)
        group = self.param_groups[number]
        dim = group["neuron_dims"][index]
        old = group["rows"][index]
        new = self._checked_rows(number, index, parameter, rows, dim)
        target = torch.isin(new, old).nonzero().flatten()
        source = torch.searchsorted(old, new[target])

        def moved(name: str, state: Tensor) -> Tensor:
            along = 0 if name == "step" else dim
            shape = list(state.shape)
            shape[along] = new.numel()
            kept = state.index_select(along, source)
            return state.new_zeros(shape).index_copy_(along, target, kept)

        # New containers rather than new entries: a state_dict taken earlier shares the old ones.
        if parameter in self.state:
            self.state[parameter] = {
                name: moved(name, state) for name, state in self.state[parameter].items()
            }
        group["rows"] = [*group["rows"][:index], new, *group["rows"][index + 1 :]]

    def state_bytes(self) -> int:
        """Bytes of optimizer state held at present; it is allocated by the first step."""
        return sum(t.nbytes for state in self.state.values() for t in state.values())

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Takes over options, rows and a copy of the state that ``state_dict`` gave.

        Raises:
            ValueError: if groups, rows or state do not fit the parameters. Nothing has changed
                then.
        """
        # torch would cast the state to the parameters' dtype, which half-precision parameters must
        # not have, and would leave the rows on the device that they were saved from. So the state
        # is taken from what the user's own hooks have made of the dictionary, right after torch
        # has loaded it.
        final: list[StateDict] = []

        def inspect(_: torch.optim.Optimizer, loaded: StateDict) -> None:
            self._check_loadable(loaded)
            final.append(loaded)

        def restore(_: torch.optim.Optimizer) -> None:
            self._restore(final[-1]["state"], final[-1]["param_groups"])

        handles = [
            self.register_load_state_dict_pre_hook(inspect),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _calls(self, group: dict[str, Any]) -> Iterator[OperatorCall]:
        """The operator calls of one step: one for each device that the group has parameters on."""
        names = self._state_names(group)
        calls: dict[torch.device, OperatorCall] = {}
        members = zip(group["params"], group["rows"], group["neuron_dims"], strict=True)
        for parameter, rows, dim in members:
            if parameter.grad is None:
                continue
            device = parameter.device
            if device not in calls:
                scale, found = (
                    None if t is None else t.to(device, non_blocking=True)
                    for t in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
                )
                calls[device] = OperatorCall(_learning_rate(group["lr"], device), scale, found)
            call = calls[device]
            call.params.append(_with_dimension(parameter))
            call.grads.append(_with_dimension(parameter.grad))
            call.rows.append(rows)
            call.neuron_dims.append(dim)
            if names:
                call.steps.append(self._state_of(parameter, "step", rows, dim))
            for name in names:
                state = self._state_of(parameter, name, rows, dim)
                call.states.setdefault(name, []).append(state)
        yield from calls.values()

    def _state_of(self, parameter: Tensor, name: str, rows: Tensor, dim: int) -> Tensor:
        state: dict[str, Tensor] = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros(
                _state_shape(name, parameter, rows, dim),
                dtype=_state_dtype(name, parameter),
                device=parameter.device,
            )
        return state[name]

    def _refuse_sparse_gradients(self) -> None:
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                grad = parameter.grad
                if grad is not None and grad.layout != torch.strided:
                    raise ValueError(
                        f"{self._at(number, index)} has a sparse gradient, which is not "
                        f"supported; use sparse=False in the layer that it belongs to"
                    )

    def _find(self, parameter: Tensor) -> tuple[int, int]:
        for number, group in enumerate(self.param_groups):
            for index, candidate in enumerate(group["params"]):
                if candidate is parameter:
                    return number, index
        raise ValueError(f"{self._name}: the parameter belongs to none of the groups")

    def _at(self, number: int, index: int) -> str:
        return f"{self._name}: parameter {index} of group {number}"

    def _complete(
        self, number: int, params: list[Tensor], rows: object, dims: object
    ) -> tuple[list[Tensor], list[int]]:
        """Rows and neuron dimensions of a group's parameters, checked."""
        for index, parameter in enumerate(params):
            if parameter.dtype not in _DTYPES:
                raise TypeError(
                    f"{self._at(number, index)} must be float64, float32, float16 or bfloat16, "
                    f"got {parameter.dtype}"
                )
            if any(parameter is other for other in params[:index]):
                raise ValueError(f"{self._at(number, index)} is in the group twice")
        for name, listed in (("rows", rows), ("neuron_dims", dims)):
            if listed is None:
                continue
            if not isinstance(listed, (list, tuple)) or len(listed) != len(params):
                got = len(listed) if isinstance(listed, (list, tuple)) else type(listed).__name__
                raise ValueError(
                    f"{self._name}: {name} of group {number} must be a list of {len(params)} "
                    f"entries, one for each parameter, got {got}"
                )
        all_dims = [
            self._checked_dim(number, i, p, dims[i] if isinstance(dims, (list, tuple)) else 0)
            for i, p in enumerate(params)
        ]
        all_rows = [
            self._checked_rows(number, i, p, rows[i], dim)
            if isinstance(rows, (list, tuple))
            else torch.arange(_with_dimension(p).shape[dim], device=p.device)
            for i, (p, dim) in enumerate(zip(params, all_dims, strict=True))
        ]
        return all_rows, all_dims

    def _checked_dim(self, number: int, index: int, parameter: Tensor, dim: object) -> int:
        dimensions = max(parameter.dim(), 1)
        if not isinstance(dim, int) or not -dimensions <= dim < dimensions:
            raise ValueError(
                f"{self._at(number, index)}: its neuron dimension must name one of the dimensions "
                f"of {list(parameter.shape)}, got {dim!r}"
            )
        return dim % dimensions

    def _checked_rows(
        self, number: int, index: int, parameter: Tensor, rows: Rows, dim: int
    ) -> Tensor:
        """Rows as int64 indices of their own, on the parameter's device."""
        where = f"{self._at(number, index)}: its rows"
        size = _with_dimension(parameter).shape[dim]
        try:
            given = torch.as_tensor(rows)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where} must be indices or a mask of {size} neurons: {error}"
            ) from error
        if given.numel() == 0 and not isinstance(rows, Tensor):
            given = given.long()  # an empty list has no dtype
        if given.dtype not in (torch.int64, torch.bool):
            raise TypeError(f"{where} must be int64 or bool, got {given.dtype}")
        if given.dtype == torch.bool:
            if given.shape != (size,):
                raise ValueError(
                    f"{where} must be a mask of {size} neurons, got bool {list(given.shape)}"
                )
            return given.nonzero().flatten().to(parameter.device)
        if given.dim() != 1:
            raise ValueError(f"{where} must be int64 [R], got int64 {list(given.shape)}")
        if outside := given[(given < 0) | (given >= size)].tolist():
            raise ValueError(f"{where} must lie in [0, {size}), got {outside[0]}")
        if bool((given[1:] <= given[:-1]).any()):
            raise ValueError(f"{where} must rise without repeats, got {_shortened(given)}")
        return given.detach().clone().to(parameter.device)

    def _check_loadable(self, loaded: StateDict) -> None:
        """Refuses what does not fit; torch itself compares the numbers of parameters."""
        for number, (own, saved) in enumerate(
            zip(self.param_groups, loaded["param_groups"], strict=False)
        ):
            if len(own["params"]) != len(saved["params"]):
                return
            needed = {"rows", "neuron_dims", *self.defaults}
            needed.discard("differentiable")  # which torch adds to the defaults on loading
            if missing := sorted(needed - set(saved)):
                raise ValueError(
                    f"{self._name}: group {number} of the loaded state has no "
                    f"{', '.join(missing)}; it was not saved by a {self._name}"
                )
            all_rows, dims = self._complete(
                number, own["params"], saved["rows"], saved["neuron_dims"]
            )
            for index, key in enumerate(saved["params"]):
                parameter, rows, dim = own["params"][index], all_rows[index], dims[index]
                for name, value in loaded["state"].get(key, {}).items():
                    shape = _state_shape(name, parameter, rows, dim)
                    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    if got != shape:
                        raise ValueError(
                            f"{self._at(number, index)}: its loaded {name} must be a tensor of "
                            f"shape {shape}, got {got}"
                        )

    def _restore(self, states: dict[Any, Any], saved_groups: list[dict[str, Any]]) -> None:
        for number, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            group["rows"], group["neuron_dims"] = self._complete(
                number, group["params"], saved["rows"], saved["neuron_dims"]
            )
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                if key in states:
                    self.state[parameter] = {
                        name: torch.empty(
                            value.shape,
                            dtype=_state_dtype(name, parameter),
                            device=parameter.device,
                        ).copy_(value)
                        for name, value in states[key].items()
                    }


def _with_dimension(t: Tensor) -> Tensor:
    """A scalar as a vector of one neuron; everything else as it is."""
    return t.view(1) if t.dim() == 0 else t


def _state_shape(name: str, parameter: Tensor, rows: Tensor, dim: int) -> list[int]:
    if name == "step":
        return [rows.numel()]
    shape = list(_with_dimension(parameter).shape)
    shape[dim] = rows.numel()
    return shape


def _state_dtype(name: str, parameter: Tensor) -> torch.dtype:
    wide = parameter.dtype == torch.float64 and name != "step"
    return torch.float64 if wide else torch.float32


def _learning_rate(lr: float | Tensor, device: torch.device) -> Tensor:
    """As the operators take it; a tensor on the parameters' device stays there, unread."""
    if not isinstance(lr, Tensor):
        return torch.tensor(lr, dtype=torch.float64, device="cpu")
    lr = lr.detach().reshape(())
    if lr.dtype not in (torch.float32, torch.float64):
        lr = lr.double()
    return lr if lr.device.type == "cpu" else lr.to(device, non_blocking=True)


def _shortened(rows: Tensor) -> str:
    listed = rows[:8].tolist()
    return str(listed) if rows.numel() <= 8 else f"{str(listed)[:-1]}, …]"
