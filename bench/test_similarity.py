"""Small sizes of similarity for pytest-benchmark: ``python -m pytest bench --benchmark-only``."""

import pytest
import torch

from neusemslice import ops


@pytest.mark.parametrize("metric", ["jaccard", "overlap"])
def test_bitset_similarity_edges(benchmark, metric):
    words = ops.bitset_pack(torch.rand(1024, 500) < 0.5)
    benchmark(ops.bitset_similarity_edges, words, None, metric, threshold=0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairwise_similarity_topk(benchmark, dtype):
    x = torch.randn(1024, 100).to(dtype)
    benchmark(ops.pairwise_similarity_topk, x, k=10)
