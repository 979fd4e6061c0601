"""Similarity of sets and of rows of numbers (contract: ``csrc/ops/similarity.h``)."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from neusemslice.ops._fake import check_one_device, register_fake

SetMetric: TypeAlias = Literal["jaccard", "dice", "overlap", "containment"]
RowMetric: TypeAlias = Literal["cosine", "pearson", "dot"]

_WORD_BITS = 64


class Edges(NamedTuple):
    """Pairs of rows and their similarity, sorted by ``(row, col)``.

    ``rows`` and ``cols`` are int64 ``[E]``; ``values`` ``[E]`` has the dtype of the dense result.
    """

    rows: Tensor
    cols: Tensor
    values: Tensor


class Neighbours(NamedTuple):
    """For each row the columns most similar to it, the best first, of equal ones the lower column.

    ``cols`` is int64 ``[R, k]``; ``values`` ``[R, k]`` has the dtype of the dense result. Where a
    row has fewer than ``k`` neighbours, -1 and NaN follow.
    """

    cols: Tensor
    values: Tensor


def bitset_pack(bits: Tensor) -> Tensor:
    """Packs sets into words.

    Args:
        bits: bool ``[..., M]``, any strides; True where the element is in the set.

    Returns:
        int64 ``[..., ceil(M / 64)]``: bit ``j`` of word ``w`` is element ``64 * w + j``, and the
        spare bits are zero.

    Raises:
        TypeError: if bits are not bool.
        ValueError: if bits have no dimension.
    """
    packed: Tensor = torch.ops.neusemslice.bitset_pack(bits)
    return packed


def bitset_unpack(words: Tensor, size: int) -> Tensor:
    """The inverse of ``bitset_pack``.

    Args:
        words: int64 ``[..., ceil(size / 64)]``.
        size: ``M``, the number of elements.

    Returns:
        bool ``[..., M]``.

    Raises:
        TypeError: if words are not int64.
        ValueError: if their number does not fit ``size``.
    """
    if words.dtype != torch.int64:
        raise TypeError(f"bitset_unpack: words must be int64, got {_describe(words)}")
    if size < 0:
        raise ValueError(f"bitset_unpack: size must not be negative, got {size}")
    count = _words_for(size)
    if words.dim() == 0 or words.shape[-1] != count:
        raise ValueError(
            f"bitset_unpack: words must be int64 [..., {count}] for {size} elements, "
            f"got {_describe(words)}"
        )
    places = torch.arange(_WORD_BITS, device=words.device)
    bits = (words.unsqueeze(-1) >> places) & 1
    return bits.bool().flatten(-2)[..., :size]


def bitset_similarity(a: Tensor, b: Tensor | None = None, metric: SetMetric = "jaccard") -> Tensor:
    """Similarity of every set of ``a`` to every set of ``b``.

    With ``i`` a set of ``a`` and ``j`` one of ``b``:

    - ``jaccard``: ``|i ∩ j| / |i ∪ j|``
    - ``dice``: ``2 |i ∩ j| / (|i| + |j|)``
    - ``overlap``: ``|i ∩ j| / min(|i|, |j|)``
    - ``containment``: ``|i ∩ j| / |i|``, the share of ``i`` in ``j``; not symmetric

    Counts are exact integers, divided once in float64 and rounded to float32. An empty set has
    similarity 0 with every set, itself included.

    Args:
        a: int64 ``[R, W]``, sets as ``bitset_pack`` makes them.
        b: int64 ``[S, W]``; None stands for ``a``, and each pair is then counted once.
        metric: one of the above.

    Returns:
        float32 ``[R, S]``.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device or metric.
    """
    similarity: Tensor = torch.ops.neusemslice.bitset_similarity(a, b, metric)
    return similarity


def bitset_similarity_edges(
    a: Tensor, b: Tensor | None = None, metric: SetMetric = "jaccard", *, threshold: float
) -> Edges:
    """The pairs of sets whose similarity is at least ``threshold``.

    The similarity is that of ``bitset_similarity``, compared with the threshold in float64 before
    it is rounded. The matrix of pairs is never held. On CUDA this waits for the device, because
    the number of edges is data.

    Args:
        a: int64 ``[R, W]``, sets as ``bitset_pack`` makes them.
        b: int64 ``[S, W]``; None stands for ``a`` with itself: pairs with ``row < col``, or for
            the containment, which is not symmetric, with ``row != col``.
        metric: as for ``bitset_similarity``.
        threshold: any number; at 0 or less, every pair is an edge.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device or metric, or a threshold that is NaN.
    """
    return Edges(*torch.ops.neusemslice.bitset_similarity_edges(a, b, metric, threshold))


def bitset_similarity_topk(
    a: Tensor, b: Tensor | None = None, metric: SetMetric = "jaccard", *, k: int
) -> Neighbours:
    """For each set of ``a``, the ``k`` sets of ``b`` that are most similar to it.

    The similarities have the bits of ``bitset_similarity``; its matrix is never held.

    Args:
        a: int64 ``[R, W]``, sets as ``bitset_pack`` makes them.
        b: int64 ``[S, W]``; None stands for ``a`` with itself: a set is no neighbour of its own.
        metric: as for ``bitset_similarity``.
        k: at least 1.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, metric or ``k``.
    """
    return Neighbours(*torch.ops.neusemslice.bitset_similarity_topk(a, b, metric, k))


def pairwise_similarity(a: Tensor, b: Tensor | None = None, metric: RowMetric = "cosine") -> Tensor:
    """Similarity of every row of ``a`` to every row of ``b``.

    - ``cosine``: the product of the rows, each divided by its norm; 0 for a row of zeros
    - ``pearson``: the same of the rows less their means; 0 for a constant row
    - ``dot``: the product of the rows themselves

    The first two lie in ``[-1, 1]``; their norms and means are in float64. Products are
    accumulated in the dtype of the result, which has the same bits each time, on the CPU at any
    number of threads. It is not differentiable: it never requires a gradient.

    Args:
        a: float64, float32, float16 or bfloat16 ``[R, D]``, any strides. A row with a NaN or an
            infinity gives NaN with every row (for ``dot``, what the product makes of it); other
            rows are as without it.
        b: ``[S, D]`` of the same dtype; None stands for ``a``: the result is then exactly
            symmetric, and but for ``dot`` its diagonal is 1 (0 where the row has no direction).
        metric: one of the above.

    Returns:
        ``[R, S]``, float64 for float64 input, else float32.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device or metric.
    """
    similarity: Tensor = torch.ops.neusemslice.pairwise_similarity(a, b, metric)
    return similarity


def pairwise_similarity_edges(
    a: Tensor, b: Tensor | None = None, metric: RowMetric = "cosine", *, threshold: float
) -> Edges:
    """The pairs of rows whose similarity is at least ``threshold``.

    The similarities have the bits of ``pairwise_similarity``; its matrix is never held. NaN is no
    edge. Not differentiable. On CUDA this waits for the device, because the number of edges is
    data.

    Args:
        a: floating point ``[R, D]``, as for ``pairwise_similarity``.
        b: ``[S, D]`` of the same dtype; None stands for ``a`` with itself: pairs with
            ``row < col``.
        metric: as for ``pairwise_similarity``.
        threshold: any number. Float32 similarities carry rounding, so ask for a little less than
            1 to find rows that are equal up to a factor.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device or metric, or a threshold that is NaN.
    """
    return Edges(*torch.ops.neusemslice.pairwise_similarity_edges(a, b, metric, threshold))


def pairwise_similarity_topk(
    a: Tensor, b: Tensor | None = None, metric: RowMetric = "cosine", *, k: int
) -> Neighbours:
    """For each row of ``a``, the ``k`` rows of ``b`` that are most similar to it.

    The similarities have the bits of ``pairwise_similarity``; its matrix is never held. NaN is no
    neighbour. Not differentiable.

    Args:
        a: floating point ``[R, D]``, as for ``pairwise_similarity``.
        b: ``[S, D]`` of the same dtype; None stands for ``a`` with itself: a row is no neighbour
            of its own.
        metric: as for ``pairwise_similarity``.
        k: at least 1.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, metric or ``k``.
    """
    return Neighbours(*torch.ops.neusemslice.pairwise_similarity_topk(a, b, metric, k))


def _words_for(size: int) -> int:
    return (size + _WORD_BITS - 1) // _WORD_BITS


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"


def _value_dtype(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _edges_fake(a: Tensor, values: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return (
        a.new_empty(size, dtype=torch.int64),
        a.new_empty(size, dtype=torch.int64),
        a.new_empty(size, dtype=values),
    )


def _neighbours_fake(a: Tensor, k: int, values: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], k)
    return a.new_empty(shape, dtype=torch.int64), a.new_empty(shape, dtype=values)


@register_fake("bitset_pack")
def _bitset_pack_fake(bits: Tensor) -> Tensor:
    *outer, size = bits.shape
    return bits.new_empty((*outer, _words_for(size)), dtype=torch.int64)


@register_fake("bitset_similarity")
def _bitset_similarity_fake(a: Tensor, b: Tensor | None, metric: str) -> Tensor:
    check_one_device("bitset_similarity", a, b)
    cols = (a if b is None else b).shape[0]
    return a.new_empty((a.shape[0], cols), dtype=torch.float32)


@register_fake("bitset_similarity_edges")
def _bitset_similarity_edges_fake(
    a: Tensor, b: Tensor | None, metric: str, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device("bitset_similarity_edges", a, b)
    return _edges_fake(a, torch.float32)


@register_fake("bitset_similarity_topk")
def _bitset_similarity_topk_fake(
    a: Tensor, b: Tensor | None, metric: str, k: int
) -> tuple[Tensor, Tensor]:
    check_one_device("bitset_similarity_topk", a, b)
    return _neighbours_fake(a, k, torch.float32)


@register_fake("pairwise_similarity")
def _pairwise_similarity_fake(a: Tensor, b: Tensor | None, metric: str) -> Tensor:
    check_one_device("pairwise_similarity", a, b)
    cols = (a if b is None else b).shape[0]
    return a.new_empty((a.shape[0], cols), dtype=_value_dtype(a))


@register_fake("pairwise_similarity_edges")
def _pairwise_similarity_edges_fake(
    a: Tensor, b: Tensor | None, metric: str, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device("pairwise_similarity_edges", a, b)
    return _edges_fake(a, _value_dtype(a))


@register_fake("pairwise_similarity_topk")
def _pairwise_similarity_topk_fake(
    a: Tensor, b: Tensor | None, metric: str, k: int
) -> tuple[Tensor, Tensor]:
    check_one_device("pairwise_similarity_topk", a, b)
    return _neighbours_fake(a, k, _value_dtype(a))


# Not differentiable. Autograd passes these by, so that their results do not claim a gradient that
# no backward pass could give. The registration lives as long as the object.
_autograd = torch.library.Library("neusemslice", "IMPL")
for _name in ("pairwise_similarity", "pairwise_similarity_edges", "pairwise_similarity_topk"):
    _autograd.impl(_name, torch.library.fallthrough_kernel, "Autograd")
