"""A model run on a batch and on its baseline in lockstep, so that gradients are multipliers.

Every torch function that the model calls is caught, be it a function, a method, an operator or
inside a module, and done twice: on the sample's tensor, and on the baseline's, which the sample's
carries with it. Views and changes in place are done to both, so the two never part. On the
sample's side autograd records a stand-in for the operation, linear in its inputs, whose gradients
are the multipliers of DeepLIFT's rescale rule (rules.py); what the model sees is the operation's
own value. Functions that torch has in Python are run with their inner calls caught.

An operation without a rule is refused. So is what would leave the path from input to output: values
read into Python, indices and masks that differ between sample and baseline, custom autograd
functions, scripts.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from neusemslice.profiling.calls import (
    Call,
    Link,
    baseline_of,
    call_of,
    is_foreign,
    link_of,
    opened,
    substituted,
    tensors_of,
    tie,
    untie,
)

Rule = Callable[["Paired", Call], Any]
"""Gives a call's value, linked to the baseline's."""


@dataclass(frozen=True)
class Table:
    """What is done about which function, by name.

    Attributes:
        rules: of functions with multipliers; a change in place has the rule of the function that
            makes a new tensor.
        followed: functions that find integers, done on both sides.
        made: functions that take no value from the tensor.
        values: functions that give a value to Python, which must be the same on both sides.
        leaving: functions that give it tensors of another kind.
    """

    rules: Mapping[str, Rule]
    followed: frozenset[str]
    made: frozenset[str]
    values: frozenset[str]
    leaving: frozenset[str]


class Paired(TorchFunctionMode):
    """The mode in which a model runs on samples and baselines.

    Args:
        model: for the names of its modules.
        table: the functions that may be called.
        watched: modules whose first input is to be kept.

    Attributes:
        roots: the first tensors that have a gradient, with what they are on the baseline's side:
            the input, or embeddings of integer input.
        seen: per watched module, its input's place in autograd's graph and the difference of
            sample and baseline; no place where it does not depend on the input.
    """

    def __init__(self, model: nn.Module, table: Table, watched: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.roots: list[tuple[Tensor, Tensor]] = []
        self.seen: dict[str, tuple[GradientEdge | None, Tensor]] = {}
        self._model = model
        self._table = table
        self._watched = frozenset(watched)
        self._within: list[str] = []
        self._open: list[Callable[..., Any]] = []
        self._kept = {id(t) for t in (*model.parameters(), *model.buffers())}

    # Where the model is.

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside the block the model's modules are followed, and its functions caught."""
        handles = []
        try:
            for name, module in self._model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # has no hooks, and gives tensors that `check` refuses
                enter, leave = self._enter(name), self._leave
                handles += [
                    module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(leave, always_call=True),
                ]
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._within.append(name)
            if name not in self._watched:
                return
            if name in self.seen:
                raise NotImplementedError(
                    f"deeplift: {name} is called more than once, so what it reads has no single "
                    "contribution"
                )
            x = args[0] if args else next(iter(kwargs.values()))
            with torch._C.DisableTorchFunction():
                edge = get_gradient_edge(x) if x.requires_grad else None
                self.seen[name] = edge, x.detach() - baseline_of(x).detach()

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._within.pop()

    @property
    def where(self) -> str:
        """The module that runs, by name and class."""
        name = self._within[-1] if self._within else ""
        kind = type(self._model.get_submodule(name)).__name__
        return f"{name} ({kind})" if name else f"the model itself ({kind})"

    def refusal(self, call: Call, why: str) -> NotImplementedError:
        """The error for what has no multipliers."""
        return NotImplementedError(f"deeplift: {call.name} in {self.where}: {why}")

    # Sample and baseline.

    def root(self, value: Tensor, baseline: Tensor) -> Tensor:
        """A tensor at which contributions end."""
        leaf = value.detach().requires_grad_()
        self.roots.append((leaf, baseline.detach()))
        # A leaf could not be changed in place.
        with torch.enable_grad():
            copy = leaf.clone()
        return tie(copy, Link(baseline.clone()))

    def integers(self, value: Tensor, baseline: Tensor) -> Tensor:
        """The two as one tensor of integers."""
        return tie(value.clone(), Link(baseline.clone()))

    def link(self, call: Call, output: Any, baseline: Any, cut: str = "") -> Any:
        """Ties what a call gave on both sides."""
        if isinstance(output, Tensor):
            return self._linked(call, output, baseline, cut)
        if isinstance(output, (tuple, list)):
            for i, (one, other) in enumerate(zip(output, baseline, strict=True)):
                linked = self.link(call, one, other, cut)
                if linked is not one:
                    raise self.refusal(call, f"its output {i} is made of integers")
        return output

    def _linked(self, call: Call, output: Tensor, baseline: Tensor, cut: str) -> Tensor:
        if output.shape != baseline.shape:
            raise self.refusal(
                call,
                f"its output has shape {list(output.shape)} for the sample and "
                f"{list(baseline.shape)} for the baseline",
            )
        if output.requires_grad:
            return tie(output, Link(baseline))
        if call.name != "embedding" and torch.equal(output, baseline):
            untie(output)
            return output
        if not output.is_floating_point():
            return tie(output, Link(baseline, cut))
        if cut:
            raise self.refusal(
                call,
                f"it makes numbers of what {cut} found, which jumps between sample and baseline",
            )
        return self.root(output, baseline)

    # Calls.

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        paired = False
        for tensor in tensors_of((args, kwargs)):
            paired |= link_of(tensor) is not None
            self.check(tensor)
        if not paired:
            return func(*args, **kwargs)
        if isinstance(func, types.FunctionType):
            if self._open[-1:] != [func]:
                self._open.append(func)
                try:
                    with self:
                        return opened(func)(*args, **kwargs)
                finally:
                    self._open.pop()
            # A method that calls the one that it overrides.
            func = getattr(torch._C.TensorBase, func.__name__)
        return self._handle(call_of(func, args, kwargs))

    def _handle(self, call: Call) -> Any:
        table = self._table
        if call.kwargs.get("out") is not None:
            raise self.refusal(call, "its argument out is not supported")
        if call.name in table.values:
            sample, baseline = call.values()
            if sample != baseline:
                raise self.refusal(
                    call, f"the value differs between sample ({sample}) and baseline ({baseline})"
                )
            return sample
        if call.name in table.made:
            return call.run(lambda tensor: tensor)
        integers = [t for t in call.paired if not t.requires_grad]
        if call.name in table.followed or len(integers) == len(call.paired):
            return self._follow(call)
        rule = table.rules.get(call.name)
        if call.name in table.leaving:
            raise self.refusal(call, "there is no rule for what leaves torch")
        if rule is None:
            output = call.run(lambda tensor: tensor)
            if tensors_of(output):
                raise self.refusal(call, "there is no rule for it")
            return output  # a shape, a dtype, …
        if integers:
            made = next((link.cut for t in integers if (link := link_of(t)) and link.cut), "")
            raise self.refusal(
                call,
                "an index or mask in it differs between sample and baseline"
                + (f"; it was found by {made}" if made else ""),
            )
        if not call.in_place or rule is Paired.both:
            return rule(self, call)
        target = call.args[0]
        with self:
            copy = target.clone()
        output = rule(self, Call(call.func, call.name, True, (copy, *call.args[1:]), call.kwargs))
        with self:
            return target.copy_(output)

    def both(self, call: Call) -> Any:
        """Calls a function that autograd may record as it is."""
        target = call.args[0] if call.in_place else None
        copies: dict[int, Tensor] = {}
        if isinstance(target, Tensor) and link_of(target) is None:
            if target._is_view() or id(target) in self._kept:
                kind = (
                    "a part of a constant tensor" if target._is_view() else "the model's own tensor"
                )
                raise self.refusal(call, f"it writes activations into {kind}")
            copies[id(target)] = target.clone()
        args, kwargs = substituted(
            (call.args, call.kwargs), lambda t: copies.get(id(t), baseline_of(t))
        )
        with torch.no_grad():
            baseline = call.func(*args, **kwargs)
        with torch.enable_grad():
            output = call.func(*call.args, **call.kwargs)
        if output is None:  # x[…] = y
            output, baseline = target, args[0]
        return self.link(call, output, baseline, f"{call.name} in {self.where}")

    def _follow(self, call: Call) -> Any:
        """Calls a function of integers, or one that finds integers, on both sides."""
        cut = next((link.cut for t in call.paired if (link := link_of(t)) and link.cut), "")
        if any(t.requires_grad for t in call.paired):
            cut = f"{call.name} in {self.where}"
        with torch.no_grad():
            if call.in_place:
                return self.both(call)
            sample = call.run(lambda tensor: tensor)
            return self.link(call, sample, call.run(baseline_of), cut)

    def check(self, tensor: Tensor) -> None:
        """Refuses a tensor that reached the model from outside torch's own functions."""
        node = tensor.grad_fn
        if node is None:
            return
        if link_of(tensor) is None or is_foreign(tensor):
            raise NotImplementedError(
                f"deeplift: {node.name()} in or before {self.where}: there is no rule for custom "
                "autograd functions and scripts"
            )
