"""DeepLIFT contributions of every neuron to a class's logit, in one forward and one backward pass.

The rescale rule of Shrikumar, Greenside and Kundaje, Learning Important Features Through
Propagating Activation Differences (2017): a neuron's contribution is the difference between its
activation and its activation on a baseline, times the multiplier with which such a difference goes
on to the logit. Over any set of neurons that every path from the input passes once, contributions
sum to the logit's own difference: ``completeness`` says how nearly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from neusemslice.graph import Inputs, device_of, is_sharded, logits_of, unwrapped
from neusemslice.graph.model import uncompiled
from neusemslice.profiling.batching import as_inputs
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
    weight is computed. Compiled parts run as they were written. Samples must not see each other.

    Args:
        model: returns logits ``[N, K]`` or ``[N, T, K]``, or what ``nss.profile`` takes.
        inputs: a batch: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        classes: ``[N]``, or ``[N, T]`` for one per token, -100 for none (on a GPU any number that
            is no class); or floating-point ``[N, K]``: the logits' weights.
        baseline: "zeros", or a tensor that broadcasts to the first input; token ids for tokens.
        modules: names of the modules at whose input contributions are wanted.

    Raises:
        NotImplementedError: for an operation without a rule, naming it and the module it is in,
            and for parameters that are spread over ranks.
        ValueError: for a baseline or classes that do not fit.
    """
    lifted = lift(model, as_inputs(inputs), classes, baseline, modules)
    return Contributions(
        lifted.difference,
        tuple(delta * multiplier for delta, multiplier in lifted.inputs),
        {name: delta * multiplier for name, (delta, multiplier) in lifted.modules.items()},
    )


class Lifted(NamedTuple):
    """Differences between sample and baseline beside their multipliers."""

    difference: Tensor
    inputs: list[tuple[Tensor, Tensor]]
    modules: dict[str, tuple[Tensor, Tensor]]


def lift(
    model: nn.Module,
    inputs: Inputs,
    classes: Tensor,
    baseline: str | Tensor,
    modules: Sequence[str],
) -> Lifted:
    """What ``deeplift`` multiplies; arguments and errors as there."""
    model = unwrapped(model)
    for name, module in model.named_modules():
        if is_sharded(module):
            raise NotImplementedError(
                f"deeplift: the parameters of {name or 'the model'} are spread over ranks, and "
                "gathering them is a step without a rule; use the whole model"
            )
    paired = Paired(model, TABLE, tuple(modules))
    with torch.inference_mode(False), _constant_parameters(model), uncompiled():
        given = inputs.normal().to(device_of(model))
        with torch.enable_grad(), paired.following():
            answer = logits_of(_with_baseline(paired, given, baseline).run(model))
        paired.check(answer)
        if missing := [name for name in modules if name not in paired.seen]:
            raise ValueError(f"deeplift: the model did not call {missing[0]!r}")
        classes = classes.to(answer.device)
        with torch.enable_grad():
            target = _class_logits(answer, classes)
        difference = target.detach() - _class_logits(baseline_of(answer), classes)
        # In the order of the places where gradients end: leaves, then what modules read.
        deltas = [leaf.detach() - base for leaf, base in paired.roots]
        deltas += [delta for _, delta in paired.seen.values()]
        places: list[Any] = [leaf for leaf, _ in paired.roots]
        places += [edge for edge, _ in paired.seen.values()]
        known = [place for place in places if place is not None and target.requires_grad]
        try:
            found = torch.autograd.grad(target.sum(), known, allow_unused=True) if known else ()
        except CheckpointError as error:
            raise NotImplementedError(
                "deeplift: the model runs parts of itself again in its backward pass "
                "(torch.utils.checkpoint), where there is no baseline; use model.eval()"
            ) from error
    gradients = dict(zip(map(id, known), found, strict=True))
    pairs = []
    for place, delta in zip(places, deltas, strict=True):
        gradient = gradients.get(id(place))
        pairs.append((delta, torch.zeros_like(delta) if gradient is None else gradient))
    roots = len(paired.roots)
    return Lifted(difference, pairs[:roots], dict(zip(paired.seen, pairs[roots:], strict=True)))


def _first(inputs: Inputs) -> tuple[str | None, Tensor]:
    """The first input, and its name if it is given by name."""
    name = None if inputs.args else next(iter(inputs.kwargs), None)
    x = inputs.args[0] if name is None else inputs.kwargs[name]
    if not isinstance(x, Tensor):
        raise ValueError(f"deeplift: the first input must be a tensor, got {type(x).__name__}")
    return name, x


def _with_baseline(paired: Paired, inputs: Inputs, baseline: str | Tensor) -> Inputs:
    """The inputs, the first of which has its baseline beside it."""
    name, x = _first(inputs)
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
    if name is not None:
        return Inputs(kwargs={**inputs.kwargs, name: both})
    return Inputs((both, *inputs.args[1:]), inputs.kwargs)


def name_of_baseline(baseline: str | Tensor) -> str:
    """What a profile remembers of its baseline: equal for equal ones."""
    if isinstance(baseline, str):
        return baseline
    values = baseline.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{values.dtype} {list(values.shape)};".encode())
    digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return f"tensor {digest.hexdigest()[:16]}"


def mean_input(batches: Iterable[tuple[Inputs, Tensor]]) -> Tensor:
    """The mean of the first input over all samples.

    Raises:
        ValueError: if it is not a floating-point tensor, or its samples differ in shape.
    """
    total, count = None, 0
    for inputs, _ in batches:
        x = _first(inputs)[1]
        if not x.is_floating_point():
            raise ValueError(
                "deeplift: tokens have no mean; give a tensor of token ids as baseline"
            )
        part = x.double().sum(0)
        if total is not None and total.shape != part.shape:
            raise ValueError(
                f"deeplift: the samples have no mean, as one has shape {list(total.shape)} and "
                f"another {list(part.shape)}"
            )
        total = part if total is None else total + part
        count += len(x)
    assert total is not None
    return (total / count).to(x.dtype)


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
        if index.device.type == "cpu" and not bool((counted | (index == -100)).all()):
            raise ValueError(
                f"deeplift: classes must lie in [0, {logits.shape[-1]}) or be -100, got "
                f"{int(index[~counted & (index != -100)][0])}"
            )
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
