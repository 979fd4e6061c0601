"""Which parameters belong to a neuron, where it is observed, and what it is coupled to."""

from neusemslice.graph.cut import cut
from neusemslice.graph.experts import choosing_among, shares
from neusemslice.graph.fit import misfit
from neusemslice.graph.grow import grow, removed_indices
from neusemslice.graph.layers import dim_of as layer_dim
from neusemslice.graph.layers import is_transposed_linear, weight_dims
from neusemslice.graph.model import (
    Inputs,
    device_of,
    evaluation,
    fingerprint,
    is_compiled,
    logits_of,
    reset_compiler,
    tensors_in,
    unwrapped,
)
from neusemslice.graph.sharding import is_sharded, smallest
from neusemslice.graph.sites import Count, Graph, Group, Layer, Norm, Reader, Site, Span
from neusemslice.graph.trace import multiply_adds, trace

__all__ = [
    "Count",
    "Graph",
    "Group",
    "Inputs",
    "Layer",
    "Norm",
    "Reader",
    "Site",
    "Span",
    "choosing_among",
    "cut",
    "device_of",
    "evaluation",
    "fingerprint",
    "grow",
    "is_compiled",
    "is_sharded",
    "is_transposed_linear",
    "layer_dim",
    "logits_of",
    "misfit",
    "multiply_adds",
    "removed_indices",
    "reset_compiler",
    "shares",
    "smallest",
    "tensors_in",
    "trace",
    "unwrapped",
    "weight_dims",
]
