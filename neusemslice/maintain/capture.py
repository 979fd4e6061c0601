"""What one layer of a running model reads and answers, and the stream that its answer is added to.

In a residual network a layer's answer, after a batch norm perhaps, is added to what came around the
block. Where that sum is written as ``a + b`` or ``torch.add``, the other side is captured as well.
The model runs until the answer is used, no further.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from neusemslice.graph import Inputs

_SUMS = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__}
_SUMS |= {torch.Tensor.__radd__, torch.Tensor.__iadd__}
_FOLLOWED = {"batch_norm", "dropout", "dropout1d", "dropout2d", "dropout3d"}
_UNCHANGED_IN_EVALUATION = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)


@dataclass
class Seen:
    """What happened at one layer.

    Attributes:
        input, output: of the layer.
        norm: name of the batch norm that alone reads the output, if there is one.
        stream: what the output, after that norm, was added to; its shape is the output's.
    """

    input: Tensor
    output: Tensor
    norm: str | None = None
    stream: Tensor | None = None


class _Done(Exception):  # noqa: N818 - it says that all has been seen
    pass


class _FirstUse(TorchFunctionMode):
    """Stops where a tensor is first used, and keeps what it is added to if that is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor: Tensor | None = None
        self.other: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        used = [*args, *kwargs.values()]
        if self.tensor is None or not any(a is self.tensor for a in used):
            return func(*args, **kwargs)
        if func in _SUMS and kwargs.get("alpha", 1) == 1:
            others = [a for a in used if isinstance(a, Tensor) and a is not self.tensor]
            if len(others) == 1 and others[0].shape == self.tensor.shape:
                self.other = others[0]
            raise _Done
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and getattr(func, "__name__", "") not in _FOLLOWED:
            raise _Done
        return result


@torch.no_grad()
def capture(model: nn.Module, layer: str, inputs: Inputs) -> Seen:
    """Runs the model until it is known what becomes of a layer's output.

    Args:
        model: in evaluation mode.
        layer: name of the layer.
        inputs: on the model's device.

    Raises:
        RuntimeError: if the model does not call the layer.
    """
    seen: list[Seen] = []
    use = _FirstUse()

    def at_layer(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        seen.append(Seen(args[0] if args else kwargs["input"], output))
        use.tensor = output

    def follow(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if seen and args and args[0] is use.tensor:
                use.tensor = output
                if isinstance(module, _BatchNorm):
                    seen[0].norm = name

        return hook

    handles = [model.get_submodule(layer).register_forward_hook(at_layer, with_kwargs=True)]
    handles += [
        module.register_forward_hook(follow(name))
        for name, module in model.named_modules()
        if isinstance(module, (_BatchNorm, *_UNCHANGED_IN_EVALUATION))
    ]
    try:
        with use:
            inputs.run(model)
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise RuntimeError(f"the model does not call its layer {layer}")
    seen[0].stream = use.other
    return seen[0]


def real_tokens(inputs: Inputs, x: Tensor) -> Tensor | None:
    """Which rows of a text model's activations ``[N, T, F]`` belong to tokens that are not padding.

    None if all do; bool ``[N * T]``.
    """
    mask = inputs.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == x.shape[:2] and x.ndim == 3:
        return mask.bool().flatten().to(x.device)
    return None
