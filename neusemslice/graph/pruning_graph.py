"""Additions to torch-pruning's graph. Only tracing a model needs this module and torch-pruning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch_pruning
from torch_pruning.dependency.node import Node
from torch_pruning.pruner.function import BasePruningFunc


class BoundedGraph(torch_pruning.DependencyGraph):  # type: ignore[misc]
    """A graph whose search for a group ends.

    torch-pruning looks at an operation again for each list of indices with which it gets there,
    and an operation that permutes features always gives another one. In networks that it
    understands, a search looks at fewer operations than the graph has edges.
    """

    def _build_dependency(self, module2node: dict[object, Node]) -> None:
        super()._build_dependency(module2node)
        self.looks = 0
        self.allowed = 500 + 3 * sum(len(node.dependencies) for node in module2node.values())
        for node in module2node.values():
            node.dependencies = _Counted(node.dependencies, self)

    def get_pruning_group(self, *arguments: Any, **options: Any) -> Any:
        self.looks = 0
        return super().get_pruning_group(*arguments, **options)


class _Counted(list[Any]):
    """What an operation depends on; counts how often that is looked at."""

    def __init__(self, items: Iterable[Any], graph: BoundedGraph) -> None:
        super().__init__(items)
        self.graph = graph

    def __iter__(self) -> Iterator[Any]:
        self.graph.looks += 1
        if self.graph.looks > self.graph.allowed:
            raise RuntimeError("the search does not end")
        return super().__iter__()


class TransposedLinearPruner(BasePruningFunc):  # type: ignore[misc]
    """What torch-pruning must know of a linear layer whose weight is [in, out].

    The two functions stand for the layer's sides in the graph; nothing is cut with them.
    """

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.nf)

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.nx)
