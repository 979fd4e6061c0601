"""What the masked optimizers share: groups with rows, compact state, saving and loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from neusemslice.optim import _clipping, _conversion
from neusemslice.optim._rows import (
    Rows,
    as_spread,
    checked_group,
    checked_rows,
    every_row,
    own_rows,
    own_share,
    placements,
    spread_type,
    with_dimension,
)


@dataclass
class OperatorCall:
    """The arguments of one operator call: parameters of one group on one device.

    Those with float32 masters are a call of their own.
    """

    lr: Tensor
    grad_scale: Tensor | None
    found_inf: Tensor | None
    states: dict[str, list[Tensor]]
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    neuron_dims: list[int] = field(default_factory=list)


class MaskedOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups name the rows to tune, and whose state is that of those rows.

    A subclass says which state its options need, how to call its operator, and which of torch's
    optimizers it is like.

    Of parameters that are spread over ranks (``DTensor``, as under ``fully_shard``) each rank
    updates its own share. Rows are those of the whole parameter; state is held, saved and loaded
    as each rank's own.
    """

    # GradScaler then leaves unscaling and skipping to `step`, through the attributes `grad_scale`
    # and `found_inf`. On the class, so that copies and unpickled optimizers have it too.
    _step_supports_amp_scaling = True

    # What from_torch() takes; the last is what to_torch() makes, unless a subclass chooses.
    _torch_kinds: ClassVar[tuple[type[torch.optim.Optimizer], ...]]

    # Own rows of spread parameters, by the rows that they were found from. Not part of what is
    # copied or pickled.
    _own_rows: dict[Tensor, tuple[Tensor, Tensor]]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._own_rows = {}
        lr = defaults["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{self._name}: lr must have one element, got {list(lr.shape)}")
        for name in ("lr", "weight_decay"):
            if not defaults[name] >= 0:
                raise ValueError(f"{self._name}: {name} must be at least 0, got {defaults[name]}")
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._own_rows = {}
        super().__setstate__(state)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state, beside steps and masters, that a group's options need."""
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
            group["rows"], group["neuron_dims"] = checked_group(
                self._name, number, group["params"], group.get("rows"), group.get("neuron_dims")
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

        As with torch's own, a gradient that is not finite spoils what it belongs to. To refuse it
        before anything changes, call ``clip_grad_norm_(inf, error_if_nonfinite=True)`` first; to
        pass over such steps, use a ``GradScaler``.

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
        self._check_gradients()
        for group in self.param_groups:
            for call in self._calls(group):
                self._update(group, call)
        return loss

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_``, but by the gradients of tuned rows only.

        In a full gradient the frozen rows count for torch; here they are neither counted nor
        scaled. Gradients that a ``GradScaler`` has scaled must be unscaled first, as for torch.

        Args:
            max_norm: what the norm may be at most.
            norm_type: exponent of the norm; ``inf`` for the largest magnitude.
            error_if_nonfinite: whether a norm that is not finite is an error.

        Returns:
            The norm before clipping, of all parameters of all groups (and all ranks) together.

        Raises:
            RuntimeError: for a norm that is not finite, if asked for, naming the first parameter of
                which that is so. Nothing has changed then.
            ValueError: for a sparse gradient. Nothing has changed then.
        """
        self._check_gradients()
        gradients = [
            _clipping.TunedGradient(p, self._rows_here(p, rows, dim), dim)
            for group in self.param_groups
            for p, rows, dim in _members(group)
            if p.grad is not None
        ]
        norm = _clipping.total_norm(gradients, norm_type)
        if error_if_nonfinite and not bool(norm.isfinite()):
            for gradient in gradients:
                if not bool(gradient.tuned.isfinite().all()):
                    raise RuntimeError(
                        f"{self._at(*self._find(gradient.parameter))} must have a finite gradient "
                        f"in its tuned rows to clip by their norm, got {norm.item()}"
                    )
            raise RuntimeError(
                f"{self._name}: the norm of the gradients of the tuned rows must be finite to clip "
                f"by it, got {norm.item()}"
            )
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.scale(factor)
        return norm

    @torch.no_grad()
    def set_rows(self, parameter: Tensor, rows: Rows) -> None:
        """Changes which rows of a parameter are tuned.

        Rows tuned before and after keep their state. New rows start as fresh ones, with a step
        number of 0 and, where there are masters, from the parameter's value. Rows that are no
        longer tuned lose their state, and start anew if they come back. A captured CUDA graph must
        be captured again.

        Raises:
            TypeError: for rows of a wrong dtype.
            ValueError: if the parameter is none of this optimizer's, or the rows do not fit it.
                Nothing has changed then.
        """
        number, index = self._find(parameter)
        group = self.param_groups[number]
        dim = group["neuron_dims"][index]
        checked = checked_rows(self._at(number, index), parameter, rows, dim)
        old = own_rows(parameter, group["rows"][index], dim)
        new = own_rows(parameter, checked, dim)
        target = torch.isin(new, old).nonzero().flatten()
        source = torch.searchsorted(old, new[target])

        def moved(name: str, state: Tensor) -> Tensor:
            along = 0 if name == "step" else dim
            kept = state.index_select(along, source)
            return _fresh_state(name, parameter, new, dim).index_copy_(along, target, kept)

        # New containers rather than new entries: a state_dict taken earlier shares the old ones.
        if parameter in self.state:
            self.state[parameter] = {
                name: moved(name, state) for name, state in self.state[parameter].items()
            }
        group["rows"] = [*group["rows"][:index], checked, *group["rows"][index + 1 :]]

    def state_bytes(self) -> int:
        """Bytes of optimizer state held here at present; it is allocated by the first step."""
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

    @classmethod
    def from_torch(
        cls,
        optimizer: torch.optim.Optimizer,
        rows: Mapping[Tensor, Rows] | None = None,
        neuron_dims: Mapping[Tensor, int] | None = None,
    ) -> Self:
        """Takes over parameters, options and state of torch's own optimizer.

        The tuned rows go on where torch's optimizer is: with its momentum or moments, and its
        number of steps. Learning-rate schedulers must be made anew.

        Args:
            optimizer: a ``torch.optim.SGD``, ``Adam`` or ``AdamW``, like the class.
            rows: tuned rows by parameter; a parameter that is missing is tuned whole.
            neuron_dims: neuron dimensions by parameter; 0 where missing.

        Raises:
            TypeError: for an optimizer of another kind, or as the class itself does.
            ValueError: likewise.
        """
        if not isinstance(optimizer, cls._torch_kinds):
            kinds = " or ".join(kind.__name__ for kind in cls._torch_kinds)
            raise TypeError(f"{cls.__name__}: from_torch takes torch's {kinds}, got {optimizer!r}")
        rows, neuron_dims = rows or {}, neuron_dims or {}
        groups = []
        for group in optimizer.param_groups:
            params = group["params"]
            dims = [neuron_dims.get(p, 0) for p in params]
            given = [
                rows[p] if p in rows else every_row(p, dim)
                for p, dim in zip(params, dims, strict=True)
            ]
            options = _conversion.options_of(cls, group)
            groups.append({**options, "params": params, "rows": given, "neuron_dims": dims})
        made = cast("Callable[..., Self]", cls)(groups)
        for group in made.param_groups:
            names = made._state_names(group)
            for p, own, dim in _members(group):
                if state := _conversion.compact_state(optimizer.state[p], names, p, own, dim):
                    made.state[p] = state
        return made

    def to_torch(self) -> torch.optim.Optimizer:
        """Torch's own optimizer over the same parameters, with the same options and state.

        Its state is dense, and 0 in the rows that are not tuned. It moves them: with decoupled
        decay at once, otherwise as soon as they have a gradient. Masters are not handed over.

        Raises:
            ValueError: if rows of one parameter have had different numbers of updates, which
                torch's one number of steps cannot say.
        """
        groups = []
        states = {}
        for number, group in enumerate(self.param_groups):
            names = self._state_names(group)
            options = _conversion.options_of(self._torch_kind(), group)
            groups.append({**options, "params": list(group["params"])})
            for index, (p, rows, dim) in enumerate(_members(group)):
                where, state = self._at(number, index), self.state.get(p, {})
                states[p] = _conversion.dense_state(where, state, names, p, rows, dim)
        made = cast("Callable[..., torch.optim.Optimizer]", self._torch_kind())(groups)
        for p, state in states.items():
            if state:
                made.state[p] = state
        return made

    def _torch_kind(self) -> type[torch.optim.Optimizer]:
        return self._torch_kinds[-1]

    def _rows_here(self, parameter: Tensor, rows: Tensor, dim: int) -> Tensor:
        """The rows of this rank's share."""
        if as_spread(parameter) is None:
            return rows
        found = self._own_rows.get(parameter)
        if found is None or found[0] is not rows:
            found = self._own_rows[parameter] = rows, own_rows(parameter, rows, dim)
        return found[1]

    def _calls(self, group: dict[str, Any]) -> Iterator[OperatorCall]:
        """The operator calls of one step."""
        kinds = self._state_names(group)
        stepped = ("step", *kinds) if kinds else ()
        spread = spread_type()
        calls: dict[tuple[torch.device, bool], OperatorCall] = {}
        for parameter, rows, dim in _members(group):
            grad = parameter.grad
            if grad is None:
                continue
            param = parameter
            if spread is not None and isinstance(param, spread):
                rows = self._rows_here(parameter, rows, dim)
                param, grad = own_share(param), own_share(grad)
            master = group["master_weights"] and param.dtype in (torch.float16, torch.bfloat16)
            names = (*stepped, "master") if master else stepped
            key = param.device, master
            call = calls.get(key)
            if call is None:
                call = calls[key] = self._empty_call(group, param.device, names)
            call.params.append(with_dimension(param))
            call.grads.append(with_dimension(grad))
            call.rows.append(rows)
            call.neuron_dims.append(dim)
            state = self.state[parameter]
            for name in names:
                if name not in state:
                    state[name] = _fresh_state(name, parameter, rows, dim)
                call.states[name].append(state[name])
        yield from calls.values()

    def _empty_call(
        self, group: dict[str, Any], device: torch.device, names: tuple[str, ...]
    ) -> OperatorCall:
        scale, found = (
            None if t is None else t.to(device, non_blocking=True)
            for t in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        return OperatorCall(
            _learning_rate(group["lr"], device), scale, found, {name: [] for name in names}
        )

    def _check_gradients(self) -> None:
        kind = spread_type()
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                grad = parameter.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise ValueError(
                        f"{self._at(number, index)} has a sparse gradient, which is not "
                        f"supported; use sparse=False in the layer that it belongs to"
                    )
                if kind is None or not (isinstance(grad, kind) or isinstance(parameter, kind)):
                    continue
                spread, wanted = placements(grad), placements(parameter)
                if spread != wanted:
                    raise ValueError(
                        f"{self._at(number, index)} must have a gradient that is spread over "
                        f"ranks as it is, {wanted}, got {spread}"
                    )

    def _find(self, parameter: Tensor) -> tuple[int, int]:
        for number, group in enumerate(self.param_groups):
            for index, candidate in enumerate(group["params"]):
                if candidate is parameter:
                    return number, index
        raise ValueError(f"{self._name}: the parameter belongs to none of the groups")

    def _at(self, number: int, index: int) -> str:
        return f"{self._name}: parameter {index} of group {number}"

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
            all_rows, dims = checked_group(
                self._name, number, own["params"], saved["rows"], saved["neuron_dims"]
            )
            for index, key in enumerate(saved["params"]):
                parameter, dim = own["params"][index], dims[index]
                rows = own_rows(parameter, all_rows[index], dim)
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
            group["rows"], group["neuron_dims"] = checked_group(
                self._name, number, group["params"], saved["rows"], saved["neuron_dims"]
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


def _members(group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The parameters of a group, each with its rows and its neuron dimension."""
    return zip(group["params"], group["rows"], group["neuron_dims"], strict=True)


def _state_shape(name: str, parameter: Tensor, rows: Tensor, dim: int) -> list[int]:
    if name == "step":
        return [rows.numel()]
    shape = list(with_dimension(own_share(parameter)).shape)
    shape[dim] = rows.numel()
    return shape


def _state_dtype(name: str, parameter: Tensor) -> torch.dtype:
    wide = parameter.dtype == torch.float64 and name != "step"
    return torch.float64 if wide else torch.float32


def _fresh_state(name: str, parameter: Tensor, rows: Tensor, dim: int) -> Tensor:
    """State of rows (of this rank's share) that have had no update."""
    if name == "master":
        share = with_dimension(own_share(parameter))
        return share.detach().index_select(dim, rows).float().contiguous()
    return torch.zeros(
        _state_shape(name, parameter, rows, dim),
        dtype=_state_dtype(name, parameter),
        device=parameter.device,
    )


def _learning_rate(lr: float | Tensor, device: torch.device) -> Tensor:
    """As the operators take it; a tensor on the parameters' device stays there, unread."""
    if not isinstance(lr, Tensor):
        return torch.tensor(lr, dtype=torch.float64, device="cpu")
    lr = lr.detach().reshape(())
    if lr.dtype not in (torch.float32, torch.float64):
        lr = lr.double()
    return lr if lr.device.type == "cpu" else lr.to(device, non_blocking=True)
