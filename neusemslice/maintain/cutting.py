"""Cutting: neurons physically removed from a copy, and the proof that it answers as masked.

The graph says what to remove; what it says is not believed. The copy must answer as the original
does with the removed neurons masked, within ``TOLERANCE`` of the output's scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.graph import (
    Graph,
    Inputs,
    Reader,
    Site,
    cut,
    evaluation,
    shares,
    tensors_in,
)
from neusemslice.slicing import Slice

TOLERANCE = 1e-5
"""Largest difference between pruned and masked, relative to the output's scale (float32)."""


def prune(model: nn.Module, kept: Slice) -> nn.Module:
    """A copy of the model without the neurons outside ``kept``, which must be closed.

    Parameters that lose neurons have no gradient in it.
    """
    return cut(model, kept.graph, kept.masks())


def check_pruned(model: nn.Module, pruned: nn.Module, kept: Slice, inputs: Inputs) -> float:
    """Largest difference between pruned and masked, relative to the masked output's scale.

    Raises:
        RuntimeError: if it is above ``TOLERANCE``; names the first site that differs.
    """
    with kept.applied(model):
        masked, masked_sites = _run_with_sites(model, kept.graph, inputs)
    try:
        answers, sites = _run_with_sites(pruned, kept.graph, inputs, kept)
    except RuntimeError as error:
        raise RuntimeError(f"restructure: the pruned model does not run: {error}") from error
    tolerance = max(TOLERANCE, 16 * torch.finfo(masked[0].dtype).eps)
    difference = max(
        _relative(answer, expected) for answer, expected in zip(answers, masked, strict=True)
    )
    if difference <= tolerance:
        return difference
    worst = "the model's output"
    for site in kept.graph.sites:
        left = kept.mask(site.name).nonzero().squeeze(1).to(masked[0].device)
        expected = masked_sites[site.name].index_select(site.readers[0].neuron_dim, left)
        if not _relative(sites[site.name], expected) <= tolerance:
            worst = f"site {site.name}"
            break
    raise RuntimeError(
        f"restructure: the pruned model differs from the masked one by {difference:.2e} of the "
        f"output's scale (tolerance {tolerance:.0e}); the first difference is at {worst}"
    )


def _relative(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return math.inf
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((got - expected).abs().max() / scale)


def _run_with_sites(
    model: nn.Module, graph: Graph, inputs: Inputs, kept: Slice | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The floating-point tensors of the output, and what each site's first reader sees.

    ``kept`` gives the widths of a cut model.
    """
    seen: dict[str, Tensor] = {}
    readers = {site.readers[0].module: site for site in graph.sites}
    width = {
        site.name: site.neurons if kept is None else int(kept.mask(site.name).sum())
        for site in graph.sites
    }

    def hook_for(module: str) -> Callable[..., None]:
        site = readers[module]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if site.readers[0].routed:
                seen[module] = shares(args, kwargs, width[site.name])[0].detach()
            else:
                seen[module] = (args[0] if args else kwargs["input"]).detach()

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True)
        for name in readers
    ]
    try:
        with evaluation(model), torch.no_grad():
            output = [t for t in tensors_in(inputs.run(model)) if t.is_floating_point()]
    finally:
        for handle in handles:
            handle.remove()
    return output, {
        site.name: _reader_in(graph, site, kept).take(
            seen[site.readers[0].module], width[site.name]
        )
        for site in graph.sites
    }


def _reader_in(graph: Graph, site: Site, kept: Slice | None) -> Reader:
    """The site's first reader; in a cut model it starts earlier by what was cut before it."""
    reader = site.readers[0]
    if kept is None:
        return reader
    gone = sum(
        int((~kept.mask(other.name)).sum()) * before.repeat
        for other in graph.sites
        for before in other.readers
        if before.module == reader.module and before.start < reader.start
    )
    return dataclasses.replace(reader, start=reader.start - gone)
