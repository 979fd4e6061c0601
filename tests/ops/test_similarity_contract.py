"""Similarity as torch operators: what they refuse, and how they are traced and compiled."""

import math

import pytest
import torch
from helpers import layouts, same_bits
from sets import assert_same_edges, random_sets, set_layouts, word_layouts
from torch.library import opcheck

from neusemslice import ops

LAYOUTS = ["contiguous", "sliced", "permuted", "expanded", "requires_grad"]
NAMESPACE = torch.ops.neusemslice


def calls(device: torch.device):
    """Each operator of two arguments by name, with arguments that it accepts."""
    words = ops.bitset_pack(random_sets(4, 70, device))
    rows = torch.randn(4, 3, device=device)
    return {
        "bitset_similarity": (words, "jaccard", ()),
        "bitset_similarity_edges": (words, "jaccard", (0.5,)),
        "bitset_similarity_topk": (words, "jaccard", (2,)),
        "pairwise_similarity": (rows, "cosine", ()),
        "pairwise_similarity_edges": (rows, "cosine", (0.5,)),
        "pairwise_similarity_topk": (rows, "cosine", (2,)),
    }


BINARY = list(calls(torch.device("cpu")))


@pytest.mark.parametrize("name", BINARY)
class TestContract:
    def call(self, name, device, **change):
        a, metric, rest = calls(device)[name]
        a, b = change.get("a", a), change.get("b", a)
        return getattr(NAMESPACE, name)(a, b, change.get("metric", metric), *rest)

    def test_refuses_wrong_dtypes(self, name, device):
        a, _, _ = calls(device)[name]
        wanted, dtype = ("int64", "int64") if "bitset" in name else ("float64, .*", "float32")
        with pytest.raises(TypeError, match=rf"{name}: a must be {wanted}, got int32 \[4, \d\]"):
            self.call(name, device, a=a.int(), b=a)
        with pytest.raises(TypeError, match=rf"{name}: b must be {dtype}, got int32 \[4, \d\]"):
            self.call(name, device, b=a.int())

    def test_refuses_wrong_shapes(self, name, device):
        a, _, _ = calls(device)[name]
        width = a.shape[1]
        with pytest.raises(ValueError, match=rf"{name}: a must be .* \[R, .\], got \w+ \[4\]"):
            self.call(name, device, a=a[:, 0], b=a)
        with pytest.raises(
            ValueError, match=rf"{name}: b must be .* \[S, {width}\].*got \w+ \[4\]"
        ):
            self.call(name, device, b=a[:, 0])
        with pytest.raises(
            ValueError, match=rf"{name}: b must be .* \[S, {width}\].*\[4, {width - 1}\]"
        ):
            self.call(name, device, b=a[:, 1:])

    def test_refuses_an_unknown_metric(self, name, device):
        with pytest.raises(ValueError, match=rf"{name}: metric must be .* got 'hamming'"):
            self.call(name, device, metric="hamming")

    def test_refuses_mixed_devices(self, name, device):
        a, _, _ = calls(device)[name]
        with pytest.raises(
            ValueError, match=rf"{name}: all tensors must be on one device.*{device.type}.*meta"
        ):
            self.call(name, device, b=a.to("meta"))


@pytest.mark.parametrize("name", [name for name in BINARY if name.endswith("edges")])
def test_refuses_a_threshold_that_is_nan(name, device):
    a, metric, _ = calls(device)[name]
    with pytest.raises(ValueError, match=rf"{name}: threshold must be a number, got nan"):
        getattr(NAMESPACE, name)(a, None, metric, math.nan)


@pytest.mark.parametrize("name", [name for name in BINARY if name.endswith("topk")])
def test_refuses_to_look_for_no_neighbour(name, device):
    a, metric, _ = calls(device)[name]
    with pytest.raises(ValueError, match=rf"{name}: k must be at least 1, got 0"):
        getattr(NAMESPACE, name)(a, None, metric, 0)


class TestTorch:
    @pytest.mark.parametrize("layout", ["contiguous", "sliced", "permuted", "expanded", "empty"])
    def test_opcheck_of_sets(self, layout, device):
        bits = random_sets(7, 150, device)
        sets = {**set_layouts(bits), "empty": bits[:0]}[layout]
        opcheck(NAMESPACE.bitset_pack.default, (sets,))
        a = word_layouts(ops.bitset_pack(bits))[layout]
        for b in (None, a):
            opcheck(NAMESPACE.bitset_similarity.default, (a, b, "containment"))
            opcheck(NAMESPACE.bitset_similarity_edges.default, (a, b, "containment", 0.3))
            opcheck(NAMESPACE.bitset_similarity_topk.default, (a, b, "containment", 3))

    @pytest.mark.parametrize("layout", [*LAYOUTS, "empty"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_opcheck_of_rows(self, dtype, layout, device):
        x = (
            torch.zeros(0, 3, dtype=dtype, device=device)
            if layout == "empty"
            else layouts((7, 5), dtype, device)[layout]
        )
        for b in (None, x):
            opcheck(NAMESPACE.pairwise_similarity.default, (x, b, "pearson"))
            opcheck(NAMESPACE.pairwise_similarity_edges.default, (x, b, "pearson", 0.1))
            opcheck(NAMESPACE.pairwise_similarity_topk.default, (x, b, "pearson", 3))

    def test_does_not_claim_a_gradient(self, device):
        x = torch.randn(5, 4, device=device, requires_grad=True)
        assert not ops.pairwise_similarity(x).requires_grad
        assert not ops.pairwise_similarity(x.detach(), x).requires_grad
        assert not ops.pairwise_similarity_edges(x, threshold=0.1).values.requires_grad
        assert not ops.pairwise_similarity_topk(x, k=1).values.requires_grad

    def test_inference_mode(self, device):
        x = torch.randn(600, 6, device=device)
        plain = ops.pairwise_similarity(x)
        with torch.inference_mode():
            assert same_bits(plain, ops.pairwise_similarity(x.clone()))

    @pytest.mark.parametrize(
        "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
    )
    def test_compiles_without_a_graph_break(self, backend, device):
        def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x * 2
            words = ops.bitset_pack(y > 0)
            sets = ops.bitset_similarity_edges(words, threshold=0.2)
            rows = ops.pairwise_similarity_edges(y, None, "pearson", threshold=0.1)
            bits = ops.bitset_unpack(words, y.shape[1])
            return (
                ops.bitset_similarity(words),
                ops.pairwise_similarity(y, y.flip(0)),
                bits,
                sets.values * 2,
                *sets,
                *rows,
                *ops.bitset_similarity_topk(words, k=3),
                *ops.pairwise_similarity_topk(y, k=3),
            )

        x = torch.randn(20, 70, device=device)
        compiled = torch.compile(step, fullgraph=True, backend=backend)(x)
        for eager, got in zip(step(x), compiled, strict=True):
            assert same_bits(eager, got)
        torch.compiler.reset()

    def test_autocast_and_deterministic_mode(self, device, monkeypatch):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        x = torch.randn(300, 60, device=device)
        words = ops.bitset_pack(x > 0)
        plain = ops.pairwise_similarity(x), ops.bitset_similarity(words)
        plain_edges = ops.pairwise_similarity_edges(x, threshold=0.1)
        torch.use_deterministic_algorithms(True)
        try:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                assert same_bits(plain[0], ops.pairwise_similarity(x))
                assert same_bits(plain[1], ops.bitset_similarity(words))
                assert_same_edges(plain_edges, ops.pairwise_similarity_edges(x, threshold=0.1))
        finally:
            torch.use_deterministic_algorithms(False)
