"""Does a model have the layers that a graph speaks of, in their sizes?"""

from __future__ import annotations

from torch import nn

from neusemslice.graph.layers import in_features, is_layer, out_features
from neusemslice.graph.sites import Graph


def misfit(graph: Graph, model: nn.Module) -> str:
    """What keeps a model of another structure from having the graph's sites, in words.

    Names the first site that differs; empty if all sites fit.
    """
    modules = dict(model.named_modules())
    sizes = {layer.name: (layer.inputs, layer.outputs) for layer in graph.layers}
    for site in graph.sites:
        for name in (*site.producers, *(reader.module for reader in site.readers)):
            if name not in sizes:
                continue
            module = modules.get(name)
            if module is None or not is_layer(module):
                return f"site {site.name}: the model has no layer {name}"
            found = (in_features(module), out_features(module))
            if found != sizes[name]:
                return (
                    f"site {site.name}: layer {name} must have {sizes[name][0]} inputs and "
                    f"{sizes[name][1]} outputs, has {found[0]} and {found[1]}"
                )
    return ""
