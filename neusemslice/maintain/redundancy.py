"""Redundancy: which neurons of a group can go because those that stay make up for them.

A neuron that others explain linearly carries nothing of its own: compensation
(``maintain/compensate.py``) folds it into them. So neurons go one by one, each time the one with
the least

    importance · sqrt(residual),

importance being the greatest share in the contribution to any one class, and the residual the share
of the neuron's variance that those still there do not explain; its root is the share of the
neuron's size. With ``P`` the inverse of the correlations of the neurons still there, the residual
of neuron j is ``1 / P[j, j]``: the variance given the others (Lauritzen 1996, Graphical Models,
5.1). When neurons G go, those K that are left have the inverse

    P[K, K] - P[K, G] inv(P[G, G]) P[G, K].

Of a neuron with several features, an attention head, the residual is the trace of the conditional
covariance, ``inv(P[j, j])`` of a block, over that of its own. A neuron that never changes has none
and goes first; of two that are the same one goes, and the other, which nothing explains any more,
then counts in full. Of each of a group's sites the first reader counts that compensation fits (a
later one behind a norm of its own may see something else), and of several sites the greatest
residual. Where nothing can be folded, because compensation cannot fit all that read the group
(experts, layers called twice), and where there are not more rows than features, from which nothing
can be told, importance alone ranks.

A semantic component (``slicing/components.py``) is neurons with alike shares in the classes. One
that is redundant within its component is explained by others of it, so no worse by all that are
kept: it goes first. Components themselves do not limit what explains, because most have one or two
neurons in a layer. Accuracy in percent of ResNet-20 after compensation with 2,000 images, on 16,000
other training images of CIFAR-10, at equal multiply-adds:

==============================  ======  ======  ======
inner channels removed          30 %    50 %    70 %
==============================  ======  ======  ======
importance alone                89.8    83.2    73.0
explained by its component      89.8    83.3    72.8
explained by all that are kept  90.1    83.8    73.7
==============================  ======  ======  ======

Scores that know the readers' weights are no better. With budgets of the groups' own, at half of the
multiply-adds, on 8,000 other training images and on 10,000 test images:

=========================================================  ========  ====
scores                                                     training  test
=========================================================  ========  ====
as above                                                       87.5  83.0
what readers lose that are fitted anew after each removal      87.1  82.8
the same, outputs weighted by squared gradients of answers     87.8  82.6
the first of these times importance                            87.7  83.1
=========================================================  ========  ====

``maintain/folding.py`` says where correlations are measured. While a group is ordered there are two
matrices like its Gram for each of its sites. Groups of more than ``SINGLY`` neurons lose a 64th of
them at once, one by one among the four times as many that lose least, so that duplicates do not go
together; that takes time with ``F³``, as a fit does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice.graph import device_of, evaluation
from neusemslice.maintain.budgets import by_importance, importance_of
from neusemslice.maintain.compensate import check_repeatable
from neusemslice.maintain.folding import Place, foldable, grams_of, sweeps
from neusemslice.ops import Gram
from neusemslice.slicing import SemanticSlicing

RIDGE = 1e-6
"""Added to the variances, which are 1, so that correlations can be inverted.

Tenfold, as often as it takes, where wide places see few dimensions: their Grams are rounded to
float32, and that rounding's eigenvalues grow with the width.
"""

SINGLY = 512
"""Neurons of a group up to which one goes at a time."""

_CONSTANT = 1e-12
"""A variance that is smaller, relative to the squared mean, is rounding."""


@torch.no_grad()
def by_redundancy(
    model: nn.Module, slicing: SemanticSlicing, loader: Iterable[Any], caller: str
) -> list[Tensor]:
    """Each group's neurons, those that go last first: int64 ``[C]``.

    Args:
        model: that the slicing was made from; it is left as it was.
        loader: samples, with labels or without; gone through for some groups at a time.
        caller: named in errors.

    Raises:
        ValueError: naming the layer, if it reads activations that are not finite; for a loader that
            can be gone through only once, or a model on the meta device.
    """
    if device_of(model).type == "meta":
        raise ValueError(f"{caller}: a model on the meta device cannot run the calibration")
    check_repeatable(loader, caller)
    orders = by_importance(slicing)
    graph = slicing.profile.graph
    with evaluation(model):
        read = foldable(model, graph, loader, caller)
        first = {index: [places[0] for places in sites] for index, sites in read.items()}
        for groups in sweeps(first):
            places = [place for found in groups.values() for place in found]
            grams = grams_of(model, places, loader, caller)
            for index, found in groups.items():
                if parts := _correlations(found, grams):
                    orders[index] = order(importance_of(slicing, graph.groups[index]), parts)
    return orders


def _correlations(places: Sequence[Place], grams: dict[Place, Gram]) -> list[Correlated]:
    """Of a group's places, whose Grams are used up; none if there are too few rows."""
    own = [(place, grams.pop(place)) for place in places]
    if any(int(gram.count) <= place.features for place, gram in own):
        return []
    return [
        Correlated.of(gram.products, place.each, _CONSTANT * gram.count * gram.mean.square())
        for place, gram in own
    ]


@dataclass(frozen=True)
class Correlated:
    """What is left of the neurons at a place.

    Attributes:
        inverse: float64 ``[n * each, n * each]``, of their correlations; symmetric.
        each: features of a neuron.
        ridge: what was added to the correlations' diagonal.
    """

    inverse: Tensor
    each: int = 1
    ridge: float = RIDGE

    @classmethod
    def of(cls, covariance: Tensor, each: int = 1, rounding: Tensor | float = 0.0) -> Correlated:
        """From covariances or any multiple of them, float64 ``[n * each, n * each]``; used up.

        Args:
            rounding: float64 ``[n * each]``, up to which a feature's variance is none.
        """
        variance = covariance.diagonal()
        real = torch.where(variance > rounding, variance, 0.0)
        # Of a head, which is one neuron, the features keep their sizes relative to each other.
        mean = real.view(-1, each).mean(1).repeat_interleave(each)
        scale = torch.where(real > 0, mean.rsqrt(), 0.0)
        covariance.mul_(scale).mul_(scale.unsqueeze(1))
        ridge = RIDGE
        while (inverse := _inverse(covariance, ridge)) is None:
            ridge *= 10
            assert ridge < 1, "correlations are finite"
        return cls(inverse, each, ridge)

    def residuals(self) -> Tensor:
        """The share of each neuron's variance that the others leave, float64 ``[n]`` in [0, 1]."""
        if self.each == 1:
            left = self.inverse.diagonal().reciprocal()
        else:
            blocks = self.inverse.unflatten(0, (-1, self.each)).unflatten(2, (-1, self.each))
            own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            left = torch.linalg.inv(own).diagonal(dim1=1, dim2=2).mean(1)
        return (left - self.ridge).clamp(0, 1)

    def only(self, neurons: Tensor) -> Correlated:
        """The same, of fewer of the neurons."""
        at = self._features(neurons)
        return Correlated(self.inverse[at.unsqueeze(1), at], self.each, self.ridge)

    def without(self, gone: Tensor, left: Tensor) -> Correlated:
        """After some neurons went, and these are left."""
        g, k = self._features(gone), self._features(left)
        rows = self.inverse.index_select(0, g)
        factor = torch.linalg.cholesky(rows.index_select(1, g))
        half = torch.linalg.solve_triangular(factor, rows.index_select(1, k), upper=False)
        rest = self.only(left)
        rest.inverse.addmm_(half.mT, half, alpha=-1)
        return rest

    def _features(self, neurons: Tensor) -> Tensor:
        within = torch.arange(self.each, device=neurons.device)
        return (neurons.unsqueeze(1) * self.each + within).flatten()


def _inverse(correlations: Tensor, ridge: float) -> Tensor | None:
    """With the ridge on the diagonal; None if that is not positive definite."""
    # The transpose of a symmetric matrix is itself, and lies as LAPACK wants it: no copy is made.
    factor = correlations.clone(memory_format=torch.contiguous_format).mT
    factor.diagonal().add_(ridge)
    failed = torch.empty((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return None if int(failed) else torch.cholesky_inverse(factor, out=factor)


def order(importance: Tensor, places: list[Correlated]) -> Tensor:
    """The neurons of a group, those that go last first: int64 ``[C]``, on the CPU.

    Args:
        importance: float64 ``[C]``, not negative.
        places: where the group is read, at least one; used up.
    """
    importance = importance.to(places[0].inverse.device)
    left = torch.arange(len(importance), device=importance.device)
    at_once = len(left) if len(left) <= SINGLY else -(-len(left) // 64)
    went = []
    while len(left):
        gone = _leaving(importance[left], places, at_once)
        rest = _all_but(len(left), gone)
        for i, place in enumerate(places):
            places[i] = place.without(gone, rest)
        went.append(left[gone])
        left = left[rest]
    return torch.cat(went).flip(0).cpu()


def _leaving(importance: Tensor, places: Sequence[Correlated], count: int) -> Tensor:
    """The neurons that go next, in this order: ``count`` of them, or all."""
    # Ties as by importance: the least important goes, and of equal ones the last.
    weakest = importance.sort(descending=True, stable=True).indices.flip(0)
    scores = _scores(importance, places)[weakest]
    nearest = weakest[scores.sort(stable=True).indices[: 4 * count].sort().values]
    importance = importance[nearest]
    places = [place.only(nearest) for place in places]
    went = []
    for _ in range(min(count, len(nearest))):
        first = _scores(importance, places).argmin().view(1)
        rest = _all_but(len(nearest), first)
        went.append(nearest[first])
        places = [place.without(first, rest) for place in places]
        importance, nearest = importance[rest], nearest[rest]
    return torch.cat(went)


def _scores(importance: Tensor, places: Sequence[Correlated]) -> Tensor:
    """What is lost with each neuron.

    In float32, so that what differs by rounding does not: the result would depend on the number of
    threads.
    """
    residual = torch.stack([place.residuals() for place in places]).amax(0)
    return (importance * residual.sqrt()).float()


def _all_but(count: int, gone: Tensor) -> Tensor:
    left = torch.ones(count, dtype=torch.bool, device=gone.device)
    return left.index_fill_(0, gone, False).nonzero().squeeze(1)
