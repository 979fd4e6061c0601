"""DeepLIFT contributions of every neuron to a class's logit, in one forward and one backward pass.

The rescale rule of Shrikumar, Greenside and Kundaje, Learning Important Features Through
Propagating Activation Differences (2017): a neuron's contribution is the difference between its
activation and its activation on a baseline, times the multiplier with which such a difference goes
on to the logit. Over any set of neurons that every path from the input passes once, contributions
sum to the logit's own difference: ``completeness`` says how nearly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.graph import Inputs, device_of, logits_of, unwrapped
from neusemslice.graph.model import uncompiled
from neusemslice.profiling.calls import baseline_of
from neusemslice.profiling.paired import Paired
from neusemslice.profiling.rule_table import TABLE


@dataclass(frozen=True)
class Contributions:
    """What neurons contribute to the logit of each sample's class.

    Attributes:
        difference: of that logit between sample and baseline, ``[N]``.
        inputs: contributions of the input; of token inputs, those of their embeddings.
        modules: per module that was asked for, contributions of the features it reads.
    """

    difference: Tensor
    inputs: tuple[Tensor, ...]
    modules: Mapping[str, Tensor]

    def completeness(self, module: str | None = None) -> Tensor:
        """``|Σ contributions - difference|`` of each sample, float64 ``[N]``.

        Args:
            module: one that every path from the input to the output goes through, with the
                samples in the first dimension of what it reads; by default the input itself.
        """
        parts = self.inputs if module is None else (self.modules[module],)
        total = torch.zeros_like(self.difference, dtype=torch.float64)
        for part in parts:
            total = total + part.double().reshape(len(total), -1).sum(1)
        return (total - self.difference.double()).abs()


def deeplift(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | Inputs,
    classes: Tensor,
    baseline: str | Tensor = "zeros",
    modules: Sequence[str] = (),
) -> Contributions:
    """Contributions to each sample's class by DeepLIFT's rescale rule.

    The first of the inputs is the one that differs from its baseline; the others are the same for
    both. Of token inputs, padding (where an "attention_mask" says so) is the same for both too.

    The model runs in the mode it is in; evaluation mode, if it has dropout or norms that take
    statistics from the batch, for these have no rule. Nothing of it is changed, no gradient of a
    weight is computed. Compiled parts run as they were written.

    Args:
        model: returns logits ``[N, K]`` or ``[N, T, K]``, or what ``nss.profile`` takes.
        inputs: a batch: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        classes: ``[N]``, or ``[N, T]`` for one per token, -100 for none; or floating-point
            ``[N, K]``: the logits' weights.
        baseline: "zeros", or a tensor that broadcasts to the first input; token ids for tokens.
        modules: names of the modules at whose input contributions are wanted.

    Raises:
        NotImplementedError: for an operation without a rule, naming it and the module it is in.
        ValueError: for a baseline or classes that do not fit.
    """
    model = unwrapped(model)
    paired = Paired(model, TABLE, tuple(modules))
    with torch.inference_mode(False), _constant_parameters(model), uncompiled():
        given = _as_inputs(inputs).normal().to(device_of(model))
        with torch.enable_grad(), paired.following():
            answer = logits_of(_with_baseline(paired, given, baseline).run(model))
        paired.check(answer)
        target = _class_logits(answer, classes.to(answer.device))
        difference = target.detach() - _class_logits(baseline_of(answer), classes.to(answer.device))
        places = [leaf for leaf, _ in paired.roots]
        places += [edge for edge, _ in paired.seen.values() if edge is not None]  # type: ignore[misc]
        gradients: list[Tensor | None] = [None] * len(places)
        if target.requires_grad:
            found = torch.autograd.grad(target.sum(), places, allow_unused=True)
            gradients = list(found)
    del answer, target
    source = iter(gradients)
    ends = [_times(leaf.detach() - base, next(source)) for leaf, base in paired.roots]
    missing = [name for name in modules if name not in paired.seen]
    if missing:
        raise ValueError(f"deeplift: the model did not call {missing[0]!r}")
    seen = {
        name: _times(delta, None if edge is None else next(source))
        for name, (edge, delta) in paired.seen.items()
    }
    return Contributions(difference, tuple(ends), seen)


def _times(delta: Tensor, gradient: Tensor | None) -> Tensor:
    return torch.zeros_like(delta) if gradient is None else delta * gradient


def _as_inputs(inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | Inputs) -> Inputs:
    if isinstance(inputs, Inputs):
        return inputs
    if isinstance(inputs, Tensor):
        return Inputs((inputs,))
    return Inputs(kwargs=inputs) if isinstance(inputs, Mapping) else Inputs(tuple(inputs))


def _with_baseline(paired: Paired, inputs: Inputs, baseline: str | Tensor) -> Inputs:
    """The inputs, the first of which has its baseline beside it."""
    named = not inputs.args
    x = next(iter(inputs.kwargs.values())) if named else inputs.args[0]
    if not isinstance(x, Tensor):
        raise ValueError(f"deeplift: the first input must be a tensor, got {type(x).__name__}")
    tokens = not x.is_floating_point()
    if isinstance(baseline, str):
        if baseline != "zeros" or tokens:
            what = "a tensor of token ids for token inputs" if tokens else "'zeros' or a tensor"
            raise ValueError(f"deeplift: baseline must be {what}, got {baseline!r}")
        other = torch.zeros_like(x)
    else:
        try:
            other = baseline.to(x.device, x.dtype).expand_as(x)
        except RuntimeError as error:
            raise ValueError(
                f"deeplift: baseline must broadcast to the input {list(x.shape)}, "
                f"got {list(baseline.shape)}"
            ) from error
        if baseline.is_floating_point() == tokens:
            raise ValueError(
                f"deeplift: baseline must be {x.dtype} as the input, got {baseline.dtype}"
            )
    mask = inputs.kwargs.get("attention_mask")
    if tokens and isinstance(mask, Tensor) and mask.shape == x.shape:
        other = torch.where(mask.bool(), other, x)
    both = paired.integers(x, other) if tokens else paired.root(x, other)
    if named:
        first = next(iter(inputs.kwargs))
        return Inputs(kwargs={**inputs.kwargs, first: both})
    return Inputs((both, *inputs.args[1:]), inputs.kwargs)


def _class_logits(logits: Tensor, classes: Tensor) -> Tensor:
    """The logit of each sample's class, ``[N]``; of tokens the sum."""
    soft = classes.is_floating_point()
    if (logits.shape if soft else logits.shape[:-1]) != classes.shape:
        raise ValueError(
            f"deeplift: the model answers {list(logits.shape)}, to which classes "
            f"{list(classes.shape)} do not fit"
        )
    if soft:
        chosen = logits * classes.to(logits.dtype)
    else:
        index = classes.long().unsqueeze(-1)
        counted = (index >= 0) & (index < logits.shape[-1])
        chosen = logits.gather(-1, index.where(counted, 0)).masked_fill(~counted, 0)
    return chosen.flatten(1).sum(1)


@contextmanager
def _constant_parameters(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter requires a gradient, so that what does comes of the input."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
