"""The graph of a model without its values: by structure alone.

A copy of the model whose tensors have shapes and nothing else is run once. Autograd's graph of that
run shows what a layer reads. Where that is nothing but other layers' answers, taken element by
element or through a batch norm, those layers' neurons arrive one to one: the inside of an MLP,
gated or not, or of a block of convolutions. Attentions are found as in attention.py; but into which
heads one divides cannot be tried here, so it is said for the attentions of transformers that are
listed below. Residual streams are left out: in transformers their neurons pass norms and embeddings
and cannot be removed. A copy with every other neuron cut must run as well: where something of a
fixed size is added, it does not.

On models that have values, tracing finds the same (trace.py), and trying each claim as well.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase

from neusemslice.graph.attention import (
    UNDIVIDED,
    Attention,
    Heads,
    Layout,
    Parts,
    find_attentions,
    halves,
    nodes_before,
    with_heads,
)
from neusemslice.graph.cut import cut
from neusemslice.graph.experts import are_experts, with_experts
from neusemslice.graph.layers import (
    Call,
    Run,
    as_layers,
    dim_of,
    in_features,
    is_grouped,
    norm_rows,
    out_features,
    rows_of,
    run_layers,
    weight_dims,
    weights_without_layer,
)
from neusemslice.graph.model import Inputs, evaluation, fingerprint, uncompiled
from neusemslice.graph.removal import counts_in, does_not_run, home_of, with_problems
from neusemslice.graph.sites import Count, Graph, Group, Reader, Site, Span


@dataclass(frozen=True)
class Family:
    """An attention of transformers: heads side by side, or queries, keys and values in blocks.

    Attributes:
        size: name of the number of features that a head has.
        tables: parameters with a row or column for each head, and in which dimension.
        shared: whether its forward pass reads the number of heads in the configuration.
        windows: whether it sees each sample in pieces.
    """

    size: str = "head_dim"
    tables: tuple[tuple[str, int], ...] = ()
    shared: bool = False
    windows: bool = False


FAMILIES = {
    "BertSelfAttention": Family("attention_head_size"),
    "GPT2Attention": Family(),
    "LlamaAttention": Family(),
    "MistralAttention": Family(),
    "MixtralAttention": Family(),
    "Phi3Attention": Family(shared=True),
    "Qwen2Attention": Family(),
    "Qwen3Attention": Family(),
    "Qwen3MoeAttention": Family(),
    "SwinAttention": Family(
        tables=(("relative_position_bias.relative_position_bias_table", 1),), windows=True
    ),
    "ViTAttention": Family(),
}
"""By the name of the module around the layers that give queries, keys and values."""

_ELEMENTWISE = frozenset(
    f"{name}Backward0"
    for name in (
        *("Add", "Sub", "Mul", "Div", "Pow", "Tanh", "Sigmoid", "Exp", "ToCopy", "Clamp"),
        *("Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish", "Softplus", "Hardtanh", "Hardswish"),
    )
)
"""Names of autograd's nodes behind which each feature is where it was."""


def structure(model: nn.Module, inputs: Inputs) -> Graph:
    """Finds the sites of a model from the shapes of its tensors; the model is left as it was.

    Args:
        model: on any device, the meta device included.
        inputs: only their shapes, dtypes and number count; they may be on the meta device.

    Raises:
        TypeError: if it returns no logits.
        RuntimeError: if what it does depends on values.
    """
    bare = _with_tensors(model, lambda tensor: tensor.to("meta"))
    with torch.inference_mode(False), torch.enable_grad(), uncompiled():
        with _without_values(bare, inputs) as (skeleton, shapes):
            run = run_layers(skeleton, shapes)
            graph = _graph(model, skeleton, run, inputs.samples)

        def problem(groups: Collection[int]) -> str:
            """Why the groups together cannot lose every other neuron; empty if they can."""
            sites = [site for site in graph.sites if site.group in groups]
            small = cut(bare, graph, {s.name: next(halves(s.neurons)) for s in sites})
            try:
                with _silent_trial(), _without_values(small, inputs) as (trial, shapes):
                    shapes.run(trial)
            except Exception as error:
                # As in removal.py, a model that cannot run so may raise anything.
                return does_not_run(error)
            return ""

        names = {module: name for name, module in skeleton.named_modules()}
        return with_experts(with_problems(graph, problem), names, run.experts, inputs.samples)


def _with_tensors(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model that has another tensor for each of its own."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(change(p.detach()), p.is_floating_point()) for p in model.parameters()
    }
    memo |= {id(b): change(b) for b in model.buffers()}
    return copy.deepcopy(model, memo)


@contextmanager
def _without_values(model: nn.Module, inputs: Inputs) -> Iterator[tuple[nn.Module, Inputs]]:
    """A copy of the model, and inputs, whose tensors have no values and take no memory."""

    def shape_of(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu")

    with FakeTensorMode(allow_non_fake_inputs=True):
        skeleton = _with_tensors(model, shape_of)
        with evaluation(skeleton, requires_grad=True), _experts_passed(skeleton):
            yield skeleton, inputs.map(shape_of)


@contextmanager
def _silent_trial() -> Iterator[None]:
    """Inside the block, an error in a run without values is raised and not logged as well."""
    log = logging.getLogger(FakeTensorMode.__module__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def _experts_passed(model: nn.Module) -> Iterator[None]:
    """Inside the block, fused experts answer with what they read.

    Which expert sees which token depends on values.
    """

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    with ExitStack() as stack:
        for module in model.modules():
            if are_experts(module):
                stack.callback(module.__dict__.pop, "forward", None)
                module.__dict__["forward"] = forward
        yield


def _graph(model: nn.Module, skeleton: nn.Module, run: Run, samples: int) -> Graph:
    calls = run.calls
    names = {module: name for name, module in skeleton.named_modules()}
    heads: dict[Attention, Heads | str] = {}
    parts: dict[Attention, Parts] = {}
    for attention in find_attentions(calls):
        heads[attention], parts[attention] = _heads(attention, skeleton, names, calls, samples)
    for call in calls.values():
        if call.rows != samples and not call.pieces:
            call.unseen = f"reads {call.rows} rows that are not samples or parts of them"
    writers = {node: layer for layer, call in calls.items() for node in call.writes}
    sites = [_site(inside, names) for inside in _insides(run, writers, skeleton)]
    answering = nodes_before(run.roots, writers)
    graph = Graph(
        fingerprint=fingerprint(model),
        num_outputs=run.answer[-1],
        sites=tuple(replace(site, group=i) for i, site in enumerate(sites)),
        groups=tuple(Group((site.name,)) for site in sites),
        layers=tuple(as_layers(calls, names)),
        outputs=tuple(names[layer] for node, layer in writers.items() if node in answering),
        skipped=weights_without_layer(model),
    )
    graph = with_heads(graph, heads, parts, names, calls)
    known = {name for site in graph.sites for name in site.producers}
    known.update(graph.outputs, graph.skipped)
    other = "its neurons do not reach one layer element by element"
    rest = {names[layer]: call.problem or other for layer, call in calls.items()}
    skipped = {name: reason for name, reason in rest.items() if name not in known}
    return replace(graph, skipped={**graph.skipped, **skipped})


@dataclass(frozen=True)
class _Inside:
    """Layers whose neurons all reach one reader one to one, and the batch norms on their way."""

    producers: list[nn.Module]
    norms: list[nn.Module]
    reader: nn.Module


def _insides(run: Run, writers: Mapping[Any, nn.Module], model: nn.Module) -> Iterator[_Inside]:
    calls = run.calls
    before = {reader: nodes_before(call.reads, writers) for reader, call in calls.items()}
    times_read = Counter(writers[n] for nodes in before.values() for n in nodes if n in writers)
    answering = nodes_before(run.roots, writers)
    affine = {
        id(parameter): norm
        for norm in model.modules()
        if isinstance(norm, _NormBase)
        for parameter in norm.parameters(recurse=False)
    }
    for reader, nodes in before.items():
        producers = [layer for node, layer in writers.items() if node in nodes]
        if not producers or calls[reader].problem or calls[reader].unseen or is_grouped(reader):
            continue
        found = _norms(nodes - writers.keys(), affine)
        if found is not None and all(
            times_read[layer] == 1
            and not calls[layer].problem
            and answering.isdisjoint(calls[layer].writes)
            and out_features(layer) == in_features(reader)
            and dim_of(layer) == dim_of(reader)
            for layer in producers
        ):
            in_order = [norm for norm in model.modules() if norm in found]
            yield _Inside(producers, in_order, reader)


def _norms(nodes: Collection[Any], affine: Mapping[int, nn.Module]) -> set[nn.Module] | None:
    """The batch norms among autograd's nodes, if the others go element by element."""
    norms = {affine.get(id(node.variable)) for node in nodes if hasattr(node, "variable")}
    rest = [n for n in nodes if not hasattr(n, "variable") and n.name() not in _ELEMENTWISE]
    known = {norm for norm in norms if norm is not None}
    if len(known) < len(norms) or any("BatchNorm" not in node.name() for node in rest):
        return None
    return known if len(known) == len(rest) else None


def _site(inside: _Inside, names: Mapping[nn.Module, str]) -> Site:
    first, reader = inside.producers[0], inside.reader
    name = names[reader]
    rows = [span for layer in inside.producers for span in rows_of(layer, names[layer])]
    return Site(
        name=names[first],
        neurons=out_features(first),
        group=0,
        producers=tuple(names[layer] for layer in inside.producers),
        readers=(Reader(name, dim_of(reader)),),
        rows=(*rows, *(span for norm in inside.norms for span in norm_rows(norm, names[norm]))),
        columns=(Span(f"{name}.weight", weight_dims(reader)[1]),),
        counts=tuple(Count(names[norm], "num_features", 1) for norm in inside.norms),
    )


def _heads(
    attention: Attention,
    model: nn.Module,
    names: Mapping[nn.Module, str],
    calls: Mapping[nn.Module, Call],
    samples: int,
) -> tuple[Heads | str, Parts]:
    """How a known attention divides, or why it cannot be said; and what else its heads own."""
    sources, reader = attention.sources, attention.reader
    for layer in (*sources, reader):
        if calls[layer].problem:
            return f"a layer of its attention {calls[layer].problem}", Parts()
    home = home_of(sources, names)
    module = model.get_submodule(home)
    family = FAMILIES.get(type(module).__name__)
    if family is None:
        known = ", ".join(FAMILIES)
        kind = type(module).__name__
        return f"{kind} is none of the attentions whose heads are known ({known})", Parts()
    if family.windows and calls[reader].rows % samples == 0:
        calls[reader].pieces = calls[reader].rows > samples
    size, width = int(getattr(module, family.size)), in_features(reader)
    layouts: dict[nn.Module, Layout]
    if len(sources) == 1:
        neurons = (out_features(sources[0]) - width) // (2 * size)
        keys = neurons * size
        share = width // max(1, neurons)
        layouts = {sources[0]: ((0, share), (width, size), (width + keys, size))}
    else:
        neurons = min(map(out_features, sources)) // size
        in_order = sorted(sources, key=lambda s: not names[s].endswith(("v_proj", "value")))
        layouts = {s: ((0, out_features(s) // max(1, neurons)),) for s in in_order}
    if neurons < 2:
        return UNDIVIDED, Parts()
    rows = tuple(Span(f"{home}.{name}", dim) for name, dim in family.tables)
    counts = counts_in(model, home, neurons)
    if family.shared:
        counts += counts_in(model, home, neurons, shared=True)
    return Heads(neurons, width // neurons, layouts), Parts(rows, counts)
