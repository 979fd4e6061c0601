"""Training redundant layers only, after DeepArc (Ren et al., ICSE 2023).

Consecutive layers that represent the data alike form a module, and only the layers of a module
behind its first, whose work is redundant, are trained on the new classes; what the others know
stays. Layers are alike if their unbiased linear CKA, estimated in mini-batches (Nguyen et al.
2021), is above 0.9; if no two are, the pair that is most alike counts. This follows the published
idea; the authors' code is not used.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

from torch import nn

from bench.continual.learner import Naive
from bench.stream import Stream
from neusemslice.profiling import cka

ALIKE = 0.9
BATCHES = 8


class DeepArc(Naive):
    """Naive retraining of redundant layers."""

    chosen: list[str]

    def prepare(self, old: Stream) -> None:
        whole = nn.Sequential(self.backbone, self.heads[-1])
        self.chosen = [
            name.removeprefix("0.")
            for name in redundant(whole, list(itertools.islice(old, BATCHES)))
        ]

    def mode(self) -> None:
        self.backbone.eval()
        for module in self.layers():
            module.train()

    def layers(self) -> list[nn.Module]:
        return with_norms(self.backbone, self.chosen)

    def trained(self) -> list[nn.Parameter]:
        return [p for module in self.layers() for p in module.parameters()]


def redundant(model: nn.Module, batches: list[object]) -> list[str]:
    """Layers, by name, whose output is like that of the layer before."""
    found = cka(model, batches)
    alike = found.values.diagonal(1)
    above = alike > ALIKE
    if not above.any():
        above = alike == alike.max()
    return [found.sites[int(i) + 1] for i in above.nonzero()]


def with_norms(model: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """Layers by name, each with the norm behind it."""
    modules = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    found = []
    for (name, module), (_, behind) in itertools.pairwise([*modules, ("", nn.Identity())]):
        if name in names:
            found.append(module)
            if isinstance(behind, nn.BatchNorm2d):
                found.append(behind)
    return found
