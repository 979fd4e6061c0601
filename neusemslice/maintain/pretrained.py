"""Restructured models of transformers, saved so that plain ``from_pretrained`` loads them.

The library builds a model from its configuration, which has one number for all layers: the width of
the MLPs, the number of heads, of experts. Where the slice leaves each layer as many, these numbers
are changed. A model built from the changed configuration must then have the restructured one's
tensors and sizes, or nothing is saved: no table of architectures is trusted.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neusemslice.slicing import Slice

_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "num_local_experts", "num_experts")
"""Numbers of a configuration that count neurons of every layer, apart from heads."""


def save_pretrained(small: nn.Module, kept: Slice, folder: str | os.PathLike[str]) -> Path:
    """Saves what is left of a model of transformers.

    Args:
        small: the restructured model; left as it was.
        kept: the slice that it holds.
        folder: for ``save_pretrained``.

    Raises:
        TypeError: if it is not a model of transformers.
        ValueError: if no configuration describes it, naming the layers and what to keep instead.
    """
    model: Any = small
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise TypeError(
            f"save_pretrained: needs a model of transformers, got {type(small).__name__}; "
            f"Restructured.save works for every model"
        )
    own = model.config
    config = _config(own, kept)
    with torch.device("meta"):
        built = type(model)(config)
    if differ := next(_differences(small, built), ""):
        raise ValueError(
            f"save_pretrained: {type(small).__name__} has no configuration for these sizes: "
            f"{differ}; keep those neurons whole, or use Restructured.save"
        )
    try:
        model.config = config
        model.save_pretrained(folder)
    finally:
        model.config = own
    return Path(folder)


def _config(own: Any, kept: Slice) -> Any:
    """The configuration with the numbers that the slice leaves."""
    config = copy.deepcopy(own)
    for name, widths in _widths(own, kept).items():
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{site} {width}" for site, width in widths.items())
            raise ValueError(
                f"save_pretrained: {name} is one number for all layers, but the slice leaves them "
                f"unequal: {listed}; restructure with keep=, which cuts layers of one size "
                f"alike, or use Restructured.save"
            )
        width = next(iter(widths.values()))
        if name != "heads":
            setattr(config, name, width)
            continue
        # Each of the groups of queries that share keys and values stays or goes as a whole.
        heads, groups = own.num_attention_heads, _groups(own)
        config.head_dim = getattr(own, "head_dim", None) or own.hidden_size // heads
        config.num_attention_heads = width * (heads // groups)
        if hasattr(own, "num_key_value_heads"):
            config.num_key_value_heads = width
    return config


def _widths(own: Any, kept: Slice) -> dict[str, dict[str, int]]:
    """By the number that counts them ("heads" for all that count heads), what sites are left."""
    counted = {getattr(own, name, None): name for name in _WIDTHS}
    if hasattr(own, "n_inner") and own.n_inner is None:
        counted[4 * own.hidden_size] = "n_inner"
    if hasattr(own, "num_attention_heads"):
        counted[_groups(own)] = "heads"
    found: dict[str, dict[str, int]] = {}
    for row in kept.table():
        if row.kept == row.neurons:
            continue
        if row.neurons not in counted:
            raise ValueError(
                f"save_pretrained: no number in the configuration counts the neurons of site "
                f"{row.site}, of which {row.kept} of {row.neurons} are left; keep it whole, or use "
                f"Restructured.save"
            )
        found.setdefault(counted[row.neurons], {})[row.site] = row.kept
    return found


def _groups(own: Any) -> int:
    """Heads of keys and values."""
    return int(getattr(own, "num_key_value_heads", None) or own.num_attention_heads)


def _differences(small: nn.Module, built: nn.Module) -> Iterator[str]:
    """Where a model has other tensors, or other numbers in its modules, than a built one."""
    shapes = {name: list(tensor.shape) for name, tensor in built.state_dict().items()}
    for name, tensor in small.state_dict().items():
        if shapes.get(name) != list(tensor.shape):
            yield f"{name} is {list(tensor.shape)}, the library would build {shapes.get(name)}"
    modules = dict(built.named_modules())
    for name, module in small.named_modules():
        there = vars(modules[name])
        for attribute, value in vars(module).items():
            # Marks of torch and of the library, and copies of what the configuration says.
            if attribute == "training" or attribute.startswith("_") or attribute in _WIDTHS:
                continue
            if isinstance(value, (int, float)) and there.get(attribute) != value:
                yield (
                    f"{attribute} of {name} is {value}, the library would build "
                    f"{there.get(attribute)}"
                )
