"""A decoder of the shape of Llama 2 7B with random weights, and a graph of it written by hand.

What is measured of it is what observing adds to a forward pass, on GPU machines that may have
neither transformers nor torch-pruning.
"""

from __future__ import annotations

from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neusemslice as nss
from neusemslice.graph import Graph, Group, Reader, Site, fingerprint

WIDTH, INNER, HEADS, LAYERS, VOCABULARY = 4096, 11008, 32, 32, 32000
LENGTH = 512


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, width: int, inner: int, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out, self.gate, self.up, self.down = (
            nn.Linear(a, b, bias=False, dtype=dtype)
            for a, b in (
                (width, 3 * width),
                (width, width),
                (width, inner),
                (width, inner),
                (inner, width),
            )
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width, dtype=dtype) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(
        self,
        layers: int,
        width: int,
        inner: int,
        heads: int,
        vocabulary: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, dtype=dtype)
        self.layers = nn.ModuleList(Layer(width, inner, heads, dtype) for _ in range(layers))
        self.norm = nn.RMSNorm(width, dtype=dtype)
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def decoder_7b() -> Decoder:
    return Decoder(LAYERS, WIDTH, INNER, HEADS, VOCABULARY)


def tokens(batch: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, LENGTH))


def graph_of(model: Decoder) -> Graph:
    """Heads and MLP neurons of every layer, as tracing would find them."""
    sites, groups = [], []
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        for producer, reader, neurons in (
            ("qkv", "out", layer.heads),
            ("gate", "down", layer.down.in_features),
        ):
            name = f"layers.{number}.{producer}"
            repeat = layer.get_submodule(reader).in_features // neurons
            place = Reader(f"layers.{number}.{reader}", -1, repeat=repeat)
            sites.append(Site(name, neurons, len(groups), (name,), (place,), (), ()))
            groups.append(Group((name,)))
    outputs = model.head.out_features
    return Graph(fingerprint(model), outputs, tuple(sites), tuple(groups), (), ("head",), {})


def profiler(model: nn.Module, x: Tensor, num_classes: int) -> nss.Profiler:
    """What observes it, without tracing."""
    assert isinstance(model, Decoder)
    graph = graph_of(model)
    with mock.patch("neusemslice.profiling.profiler.trace", return_value=graph):
        return nss.Profiler(model, x, num_classes=num_classes)
