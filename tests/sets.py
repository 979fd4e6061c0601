"""Sets as booleans and as words in the layouts that operators meet, and edges compared."""

import torch
from helpers import same_bits

from neusemslice import ops


def random_sets(rows: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Sets of every density; the first is empty, the last holds everything."""
    bits = torch.rand(rows, size, device=device) < torch.rand(rows, 1, device=device)
    bits[:1] = False
    bits[1:][-1:] = True
    return bits


def set_layouts(bits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same sets in the layouts that operators meet."""
    wide = torch.ones(bits.shape[0], 2 * bits.shape[1], dtype=torch.bool, device=bits.device)
    wide[:, ::2] = bits
    return {
        "contiguous": bits,
        "sliced": wide[:, ::2],
        "permuted": bits.t().contiguous().t(),
        "expanded": bits[-1:].expand(bits.shape),
    }


def word_layouts(words: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = torch.full((words.shape[0], 2 * words.shape[1]), -1, device=words.device)
    wide[:, ::2] = words
    return {
        "contiguous": words,
        "sliced": wide[:, ::2],
        "permuted": words.t().contiguous().t(),
        "expanded": words[-1:].expand(words.shape),
        "empty": words[:0],
    }


def assert_same_edges(a: ops.Edges, b: ops.Edges) -> None:
    assert a.rows.dtype == a.cols.dtype == torch.int64
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert same_bits(x, y), name
