"""How alike the layers of a model represent the same samples: linear CKA.

It lies beside the profiler, not beside slicing, because it needs the model and its data: which
samples a layer takes for alike is not in a profile, whose statistics have left the samples behind.

Two layers are alike if the similarities between samples that the one has go with those that the
other has. HSIC measures that by the product of the two Gram matrices; its unbiased estimator
(Song et al. 2012) is a plain product once their diagonals are left out and their rows are centred
for that, and CKA is its cosine. The Gram matrices of all samples do not fit, so they are those of
groups of a fixed number of samples, as in Nguyen et al. 2021, and the products are added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice._progress import track
from neusemslice.graph import device_of, evaluation
from neusemslice.profiling.batching import LabelsOf, batches
from neusemslice.profiling.profile import Profile
from neusemslice.profiling.profiler import Profiler

GROUP = 256
"""Samples whose Gram matrices are compared with each other."""

_LEAST = 4
"""Samples below which the unbiased estimator is not defined."""


@dataclass(frozen=True)
class LayerSimilarity:
    """Linear CKA of each layer with each.

    Attributes:
        sites: the layers' names.
        values: float64 ``[L, L]`` in ``[-1, 1]``, symmetric: 1 on the diagonal; 0 for a layer that
            does not tell samples apart, with itself too.
        samples: how many samples it was made from.
    """

    sites: tuple[str, ...]
    values: Tensor
    samples: int


class LinearCKA:
    """Unbiased linear CKA between layers, from activations that come batch by batch.

        cka = LinearCKA()
        for x in loader:
            cka.update({"first": first(x), "second": second(x)})
        cka.compute().values

    Samples are compared within groups of ``group``, in the order in which they come. Each group's
    HSIC is an unbiased estimate of that of the population, whatever its size, and the groups'
    average (each weighs by its samples) is one, too. With one group for all samples it is the
    estimator of the whole data. With more, pairs of samples of different groups are not looked at:
    the estimate scatters more, the more the smaller the groups are, and samples that come sorted
    (by class, say) are only compared with their like, so shuffle them. CKA is a ratio of such
    estimates, so it is itself unbiased only in the limit of many samples.

    How the samples are split into batches does not matter, and batches may have any size. Gram
    matrices and sums are float64. A group's activations are kept until it is full.

    Args:
        group: samples of a group, at least 4.

    Raises:
        ValueError: for a smaller group.
    """

    def __init__(self, group: int = GROUP) -> None:
        if group < _LEAST:
            raise ValueError(f"LinearCKA: group must be at least {_LEAST}, got {group}")
        self.group = group
        self.samples = 0
        self._sites: tuple[str, ...] = ()
        self._waiting: dict[str, list[Tensor]] = {}
        self._count = 0
        self._products = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, activations: Mapping[str, Tensor]) -> None:
        """Adds a batch.

        Args:
            activations: of each layer ``[N, …]``, finite; what lies behind the first dimension are
                features. The same layers in each batch.

        Raises:
            ValueError: naming the layer, if the layers are not those of the batch before, differ
                in their number of samples or have values that are not finite.
        """
        rows = {
            name: x.detach().flatten(1) if x.ndim > 1 else x.detach().unsqueeze(1)
            for name, x in activations.items()
        }
        self._check(rows)
        samples = len(next(iter(rows.values())))
        for name, x in rows.items():
            self._waiting[name].append(x)
        self.samples += samples
        self._count += samples
        # What is left at the end must be enough for a group of its own.
        while self._count >= self.group + _LEAST:
            self._products += self._take(self.group)

    def compute(self) -> LayerSimilarity:
        """CKA of the samples so far; more may follow.

        Raises:
            ValueError: for fewer than 4 samples, of which there is no unbiased estimate.
        """
        if self.samples < _LEAST:
            raise ValueError(f"LinearCKA: at least {_LEAST} samples are needed, got {self.samples}")
        products = self._products + self._group_products(self._joined())
        norms = products.diagonal().sqrt()
        scale = norms.unsqueeze(1) * norms
        values = torch.where(scale > 0, products / scale, 0.0)
        values = values.clamp(-1, 1)
        values.diagonal().copy_((norms > 0).double())
        return LayerSimilarity(self._sites, values, self.samples)

    def _check(self, rows: Mapping[str, Tensor]) -> None:
        if not self._sites:
            if not rows:
                raise ValueError("LinearCKA: activations must be of at least one layer, got none")
            self._sites = tuple(rows)
            self._waiting = {name: [] for name in rows}
            self._products = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        if tuple(rows) != self._sites:
            raise ValueError(f"LinearCKA: layers must be {self._sites}, got {tuple(rows)}")
        samples = len(rows[self._sites[0]])
        for name, x in rows.items():
            if len(x) != samples:
                raise ValueError(
                    f"LinearCKA: {name} has {len(x)} samples, but {self._sites[0]} has {samples}"
                )
            if not bool(x.isfinite().all()):
                raise ValueError(f"LinearCKA: {name} has values that are NaN or infinite")

    def _joined(self) -> list[Tensor]:
        return [torch.cat(parts) for parts in self._waiting.values()]

    def _take(self, samples: int) -> Tensor:
        """The products of the first of the samples that wait, which then wait no longer."""
        joined = self._joined()
        self._waiting = {name: [x[samples:]] for name, x in zip(self._waiting, joined, strict=True)}
        self._count -= samples
        return self._group_products([x[:samples] for x in joined])

    @staticmethod
    def _group_products(group: Sequence[Tensor]) -> Tensor:
        """Samples times unbiased HSIC of each two layers, float64 ``[L, L]`` on the CPU."""
        samples = len(group[0])
        centred = torch.stack([_centred_gram(x).flatten() for x in group])
        # n * HSIC, the latter being the product over n (n - 3).
        return centred @ centred.t() / (samples - 3)


def _centred_gram(x: Tensor) -> Tensor:
    """The Gram matrix of the samples without its diagonal, centred so that HSIC is a product.

    Float64 ``[N, N]`` on the CPU; zero where the features do not tell the samples apart.
    """
    x = x.double()
    # HSIC does not depend on where the origin is, but rounding does. The first row goes first, so
    # that features that are constant become exactly zero.
    x = x - x[:1]
    x = x - x.mean(0)
    gram = (x @ x.t()).cpu()
    gram.fill_diagonal_(0)
    n = len(gram)
    largest = gram.abs().max()
    rows = gram.sum(1) / (n - 2)
    gram = gram - rows - rows.unsqueeze(1) + rows.sum() / (n - 1)
    gram.fill_diagonal_(0)
    # What is left of features such as those in which one sample differs from all others is
    # rounding, and would be compared as if it were something.
    rounding = 8 * n * torch.finfo(torch.float64).eps * largest
    return gram if bool(gram.abs().max() > rounding) else torch.zeros_like(gram)


def cka(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    sites: Sequence[str] | None = None,
    labels: LabelsOf | None = None,
    group: int = GROUP,
) -> LayerSimilarity:
    """Unbiased linear CKA between the sites of a model, in one sweep over a loader.

    A sample's activation at a site is its mean over space or over the real tokens, as in a profile.
    What is estimated, and what ``group`` changes, is said in ``LinearCKA``. The model runs in
    evaluation mode and is left as it was.

    Args:
        model, loader, sites, labels: as for ``neusemslice.profile``. Labels say how many samples a
            batch has; their values do not matter.
        group: samples that are compared with each other, at least 4.

    Raises:
        ValueError, TypeError: as ``neusemslice.profile`` for model, loader and sites; naming the
            site, for activations that are not finite; for fewer than 4 samples.
    """
    found = LinearCKA(group)
    device = device_of(model)
    profiler: Profiler | None = None
    with ExitStack() as stack, evaluation(model), torch.no_grad():
        for inputs, y in batches(track(loader, "cka"), "cka", labels, soft=True):
            # Each sample is a class of its own, whose mean is the sample's activation.
            names = tuple(map(str, range(len(y))))
            if profiler is None:
                options: dict[str, Any] = {"num_classes": len(names), "sites": sites}
                profiler = stack.enter_context(Profiler(model, inputs.head(2), **options))
            profiler.profile = Profile.empty(profiler.graph, names, ("avg",), device)
            with profiler.batch(torch.arange(len(y)), inputs.kwargs.get("attention_mask")):
                inputs.to(device).run(model)
            if bad := profiler.profile.nonfinite():
                listed = ", ".join(f"{name} ({count})" for name, count in bad.items())
                raise ValueError(f"cka: activations are NaN or infinite at {listed}")
            states = profiler.profile.activations
            found.update({name: s.mean for name, s in states.items() if s.mean is not None})
    return found.compute()
