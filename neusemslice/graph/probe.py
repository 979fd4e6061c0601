"""Do a producer's neurons arrive at a reader where the graph says they do?

The question is put to the model itself. Every layer's output is replaced by what it was in a plain
run, with some of its neurons moved; so a change that a reader sees comes from the layers right
before it and not from further up. What changes must lie within the features that belong to the
moved neurons. A transpose, a shuffle, attention or a norm called as a function moves others, and
gives the wrong map away. Norm modules that mix neurons are passed through for the run, since they
keep each neuron in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.graph.layers import argument, dim_of, mixes_neurons, out_features
from neusemslice.graph.model import Inputs

Spans = Mapping[nn.Module, Mapping[nn.Module, tuple[int, int]]]
"""For each producer and reader: (start, repeat) of the producer's neurons in the reader's input."""


class Probe:
    """Runs a model in evaluation mode with neurons moved.

    Args:
        layers: those that a forward pass calls.
        norms: those whose input is to be seen as well.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        layers: Collection[nn.Module],
        norms: Collection[nn.Module] = (),
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.layers = layers
        self.norms = norms
        outputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
        self.plain = self._run(outputs)
        # A layer that is called more than once has no output of its own to come back to.
        self.pinned = {layer: made[0] for layer, made in outputs.items() if len(made) == 1}
        self.generator = torch.Generator().manual_seed(0)
        self.sizes: dict[nn.Module, Tensor] = {}

    def wrong(self, spans: Spans) -> set[tuple[nn.Module, nn.Module]]:
        """The pairs of producer and reader whose neurons do not arrive as their span says."""
        suspects = self._suspects(spans, spans)
        pairs = {
            (producer, reader)
            for producer, readers in spans.items()
            for reader in readers
            if reader in suspects
        }
        if not pairs:
            return set()
        # Several producers of one reader were moved at once; now one by one, to find which it is.
        return {
            (producer, reader)
            for producer in {producer for producer, _ in pairs}
            for reader in self._suspects(spans, {producer: spans[producer]})
            if (producer, reader) in pairs
        }

    def changed(
        self, moved: Mapping[nn.Module, Tensor], readers: Collection[nn.Module]
    ) -> dict[nn.Module, Tensor]:
        """For each reader which features of its input change, bool, if neurons are moved.

        Args:
            moved: the neurons to move in each layer's output, bool.
        """
        seen = self._run_moved(moved, 1.0, readers)
        return {reader: self._changed(reader, seen) for reader in readers}

    def fits(
        self, kept: Mapping[nn.Module, Tensor], readers: Mapping[nn.Module, Tensor]
    ) -> set[nn.Module]:
        """Readers that read what they did in the plain run if layers give fewer features.

        Args:
            kept: the features that each layer gives, bool.
            readers: those that each reader is to read then, bool.

        Raises:
            Exception: whatever a model raises that cannot run so.
        """

        def answer(layer: nn.Module, *_: Any, **__: Any) -> Tensor:
            plain = self.pinned[layer].clone()
            return _chosen(plain, layer, kept[layer]) if layer in kept else plain

        with ExitStack() as stack:
            for layer in self.pinned:
                stack.enter_context(_stand_in(layer, functools.partial(answer, layer)))
            seen = self._run(readers=readers)
        return {
            reader
            for reader, features in readers.items()
            if _alike(seen.get(reader), _chosen(self.plain[reader], reader, features))
        }

    def pieces(self) -> set[nn.Module]:
        """Layers that read each sample as several rows of their input, next to each other.

        Windows of an image are such rows, and the tokens of several texts laid end to end. The
        first sample alone must give the first of the rows.
        """
        samples = self.inputs.samples
        several = {
            reader: x
            for reader, x in self.plain.items()
            if reader in self.layers
            and dim_of(reader) == -1
            and x.shape[0] > samples
            and x.shape[0] % max(1, samples) == 0
        }
        if samples < 2 or not several:
            return set()
        alone = self._run(inputs=self.inputs.head(1))
        return {reader for reader, x in several.items() if _starts_with(x, alone.get(reader))}

    def _suspects(self, spans: Spans, moved: Spans) -> set[nn.Module]:
        """Readers that see a change outside the features of the moved neurons."""
        half = {
            producer: torch.rand(out_features(producer), generator=self.generator) < 0.5
            for producer in moved
        }
        suspects: set[nn.Module] = set()
        for chosen in (half, {producer: ~mask for producer, mask in half.items()}):
            allowed: dict[nn.Module, Tensor] = {}
            for producer, mask in chosen.items():
                for reader, (start, repeat) in moved[producer].items():
                    if reader not in self.plain:
                        continue
                    size = self.plain[reader].shape[dim_of(reader)]
                    features = allowed.setdefault(reader, torch.zeros(size, dtype=torch.bool))
                    part = mask.repeat_interleave(repeat)[: max(0, size - start)]
                    features[start : start + len(part)] |= part
            # Up and down, because a neuron behind a ReLU may only be seen to rise.
            for step in (1.0, -1.0):
                seen = self._run_moved(chosen, step, allowed)
                for reader, features in allowed.items():
                    if bool((self._changed(reader, seen) & ~features).any()):
                        suspects.add(reader)
        return suspects

    def _run_moved(
        self, moved: Mapping[nn.Module, Tensor], step: float, readers: Collection[nn.Module]
    ) -> dict[nn.Module, Tensor]:
        """What the readers read, with neurons moved and every other output as in the plain run."""

        def answer(layer: nn.Module, *_: Any, **__: Any) -> Tensor:
            # The model may write into what it is given.
            plain = self.pinned[layer].clone()
            return self._move(plain, layer, moved[layer], step) if layer in moved else plain

        def move(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
            return self._move(output, layer, moved[layer], step)

        with ExitStack() as stack:
            for layer in self.layers:
                if layer in self.pinned:
                    # What the layer would compute is not needed, and is most of the work.
                    stack.enter_context(_stand_in(layer, functools.partial(answer, layer)))
                elif layer in moved:
                    stack.callback(layer.register_forward_hook(move).remove)
            return self._run(readers=readers)

    def _move(self, x: Tensor, layer: nn.Module, mask: Tensor, step: float) -> Tensor:
        shape = [1] * x.ndim
        shape[dim_of(layer)] = -1
        if layer not in self.sizes:
            self.sizes[layer] = 1 + x.nan_to_num(0, 0, 0).abs().amax()
        distance = step * self.sizes[layer] * mask.to(x).view(shape)
        # Not equally far everywhere: a softmax does not see what is added to all of its inputs.
        for dim, size in enumerate(x.shape):
            along = [1] * x.ndim
            along[dim] = size
            varied = 1 + torch.rand(size, generator=self.generator).to(x)
            distance = distance * varied.view(along)
        return x + distance

    def _run(
        self,
        outputs: Mapping[nn.Module, list[Tensor]] | None = None,
        readers: Collection[nn.Module] | None = None,
        inputs: Inputs | None = None,
    ) -> dict[nn.Module, Tensor]:
        """What the readers, by default all layers and norms, read; fills in what layers write."""
        read: dict[nn.Module, Tensor] = {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read[module] = argument(args, kwargs).clone()

        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            assert outputs is not None
            outputs[module].append(output.clone())

        def through(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return args[0] if args else output

        with ExitStack() as stack, torch.no_grad():
            for layer in (*self.layers, *self.norms) if readers is None else readers:
                hook = layer.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(hook.remove)
            for layer in outputs or ():
                stack.callback(layer.register_forward_hook(after).remove)
            for module in self.model.modules():
                if mixes_neurons(module):
                    stack.callback(module.register_forward_hook(through).remove)
            (self.inputs if inputs is None else inputs).run(self.model)
        return read

    def _changed(self, reader: nn.Module, seen: Mapping[nn.Module, Tensor]) -> Tensor:
        """Which features of what a reader reads are not as in the plain run, bool."""
        before, after = self.plain[reader], seen.get(reader)
        dim = dim_of(reader)
        if after is None or after.shape != before.shape:
            return torch.ones(before.shape[dim], dtype=torch.bool)
        changed = before != after
        if before.isnan().any():
            changed &= ~(before.isnan() & after.isnan())
        return changed.movedim(dim, -1).flatten(0, -2).any(0).cpu()


def _chosen(x: Tensor, layer: nn.Module, features: Tensor) -> Tensor:
    return x.index_select(dim_of(layer), features.nonzero().squeeze(1).to(x.device))


def _alike(got: Tensor | None, expected: Tensor) -> bool:
    """Whether two tensors differ by no more than sums of other lengths may."""
    if got is None or got.shape != expected.shape:
        return False
    scale = float(expected.detach().nan_to_num(0, 0, 0).abs().max()) if expected.numel() else 0.0
    least = scale * torch.finfo(expected.dtype).eps ** 0.5
    return torch.allclose(got, expected, rtol=0, atol=least, equal_nan=True)


@contextmanager
def _stand_in(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Inside the block the module answers with ``forward``."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _starts_with(whole: Tensor, part: Tensor | None) -> bool:
    if part is None or part.shape[1:] != whole.shape[1:]:
        return False
    # Sums over batches of other sizes may be rounded otherwise.
    return torch.allclose(
        whole[: part.shape[0]], part, rtol=1e-2, atol=1e-3 * float(part.abs().max())
    )
