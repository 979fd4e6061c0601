"""Set and row similarity, dense and as edges, against oracles, contracts and laws."""

import math
import subprocess
import sys

import pytest
import torch
from helpers import layouts, num_threads, same_bits
from hypothesis import given
from hypothesis import strategies as st
from sets import assert_same_edges, random_sets, set_layouts, word_layouts

from neusemslice import _C, ops, reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "sliced", "permuted", "expanded", "requires_grad"]
SET_METRICS = ["jaccard", "dice", "overlap", "containment"]
ROW_METRICS = ["cosine", "pearson", "dot"]
UNIT_METRICS = ["cosine", "pearson"]


def tolerance(dtype: torch.dtype) -> float:
    """Rounding of a float64 or a float32 product of unit vectors."""
    return 1e-13 if dtype == torch.float64 else 2e-6


def assert_similar(
    got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, scale: float = 1.0
) -> None:
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    atol = tolerance(dtype) * scale
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=atol)


def product_scale(a: torch.Tensor, b: torch.Tensor, metric: str) -> float:
    """The greatest product of two rows' norms, to which rounding is relative; at least 1."""
    if metric != "dot" or a.numel() == 0 or b.numel() == 0:
        return 1.0
    return max(1.0, float(a.double().norm(dim=1).max() * b.double().norm(dim=1).max()))


def thresholded(dense: torch.Tensor, threshold: float, pairs: str) -> ops.Edges:
    """The edges of a dense result; `pairs` is "all", "upper" or "distinct"."""
    kept = dense.double() >= threshold
    if pairs == "upper":
        kept = kept.triu(1)
    elif pairs == "distinct":
        kept &= ~torch.eye(len(dense), dtype=torch.bool, device=dense.device)
    rows, cols = kept.nonzero(as_tuple=True)
    return ops.Edges(rows, cols, dense[kept])


def assert_nearest(got: ops.Neighbours, dense: torch.Tensor, k: int, *, own: bool) -> None:
    """The neighbours are those of the dense result, with its bits."""
    cols, values = reference.nearest(dense.cpu(), k, own=own)
    assert torch.equal(got.cols.cpu(), cols)
    assert same_bits(got.values.cpu(), values)


class TestPack:
    @given(st.integers(0, 4), st.integers(0, 3), st.sampled_from([0, 1, 63, 64, 65, 128, 200]))
    def test_equals_the_oracle_and_unpacks(self, outer, inner, size):
        bits = torch.rand(outer, inner, size) < 0.5
        words = ops.bitset_pack(bits)
        assert same_bits(words, reference.bitset_pack(bits))
        assert same_bits(ops.bitset_unpack(words, size), bits)

    @pytest.mark.parametrize("layout", ["contiguous", "sliced", "permuted", "expanded"])
    def test_any_strides(self, layout, device):
        bits = set_layouts(random_sets(9, 130, device))[layout]
        assert same_bits(ops.bitset_pack(bits).cpu(), reference.bitset_pack(bits))

    def test_one_dimension_and_the_top_bit(self, device):
        bits = torch.zeros(70, dtype=torch.bool, device=device)
        bits[[0, 63, 69]] = True
        words = ops.bitset_pack(bits)
        assert words.tolist() == [-(2**63) + 1, 2**5]
        assert torch.equal(ops.bitset_unpack(words, 70), bits)

    def test_refuses(self, device):
        with pytest.raises(
            TypeError, match=r"bitset_pack: bits must be bool, got float32 \[2, 3\]"
        ):
            ops.bitset_pack(torch.zeros(2, 3, device=device))
        with pytest.raises(ValueError, match=r"bitset_pack: bits must have a dimension.*bool \[\]"):
            ops.bitset_pack(torch.tensor(True, device=device))
        words = torch.zeros(2, 2, dtype=torch.int64, device=device)
        with pytest.raises(TypeError, match=r"words must be int64, got int32 \[2, 2\]"):
            ops.bitset_unpack(words.int(), 70)
        with pytest.raises(
            ValueError, match=r"int64 \[..., 1\] for 64 elements, got int64 \[2, 2\]"
        ):
            ops.bitset_unpack(words, 64)
        with pytest.raises(ValueError, match="size must not be negative, got -1"):
            ops.bitset_unpack(words, -1)


class TestSets:
    @pytest.mark.parametrize("metric", SET_METRICS)
    @pytest.mark.parametrize("layout", ["contiguous", "sliced", "permuted", "expanded"])
    def test_equals_the_oracle(self, layout, metric, device):
        bits, other = random_sets(30, 300, device), random_sets(17, 300, device)
        a = word_layouts(ops.bitset_pack(bits))[layout]
        b = word_layouts(ops.bitset_pack(other))[layout]
        bits, other = ops.bitset_unpack(a, 300).cpu(), ops.bitset_unpack(b, 300).cpu()
        expected = reference.set_similarity(bits, other, metric).float()
        assert same_bits(ops.bitset_similarity(a, b, metric).cpu(), expected)
        expected = reference.set_similarity(bits, bits, metric).float()
        assert same_bits(ops.bitset_similarity(a, None, metric).cpu(), expected)

    @given(
        st.integers(0, 6),
        st.integers(0, 6),
        st.sampled_from([0, 1, 64, 65, 150]),
        st.sampled_from(SET_METRICS),
    )
    def test_any_shape(self, rows, cols, size, metric):
        bits, other = random_sets(rows, size), random_sets(cols, size)
        a, b = ops.bitset_pack(bits), ops.bitset_pack(other)
        expected = reference.set_similarity(bits, other, metric)
        assert same_bits(ops.bitset_similarity(a, b, metric), expected.float())
        edges = ops.bitset_similarity_edges(a, b, metric, threshold=0.4)
        kept = expected >= 0.4
        assert edges.rows.tolist() == kept.nonzero()[:, 0].tolist()
        assert edges.cols.tolist() == kept.nonzero()[:, 1].tolist()
        assert same_bits(edges.values, expected[kept].float())

    def test_laws(self, device):
        a = ops.bitset_pack(random_sets(500, 150, device))  # more than one tile
        dense = {metric: ops.bitset_similarity(a, None, metric) for metric in SET_METRICS}
        for metric, values in dense.items():
            assert values.min() >= 0
            assert values.max() <= 1
            assert values.diagonal()[0] == 0, "an empty set is similar to nothing"
            filled = ops.bitset_unpack(a, 150).any(1)
            assert (values.diagonal() == filled).all()
            if metric != "containment":
                assert torch.equal(values, values.t())
            assert same_bits(values, ops.bitset_similarity(a, a, metric))
        assert (dense["dice"] >= dense["jaccard"]).all()
        assert (dense["overlap"] >= dense["dice"]).all()
        assert torch.equal(dense["overlap"], dense["containment"].maximum(dense["containment"].t()))
        assert not torch.equal(dense["containment"], dense["containment"].t())

    def test_empty_sets(self, device):
        nothing = torch.zeros(2, 1, dtype=torch.int64, device=device)
        for metric in SET_METRICS:
            assert (ops.bitset_similarity(nothing, None, metric) == 0).all()
            edges = ops.bitset_similarity_edges(nothing, None, metric, threshold=1e-9)
            assert edges.rows.numel() == 0

    @pytest.mark.parametrize("metric", SET_METRICS)
    @pytest.mark.parametrize("threshold", [-math.inf, 0.0, 0.31, 1.0, math.inf])
    def test_edges_equal_the_thresholded_dense_result(self, threshold, metric, device):
        bits = random_sets(500, 70, device)  # more than one tile
        bits[480:] = bits[10:30]
        a, b = ops.bitset_pack(bits), ops.bitset_pack(bits[20:490])
        one = "distinct" if metric == "containment" else "upper"
        for other, pairs in ((None, one), (b, "all")):
            dense = ops.bitset_similarity(a, other, metric)
            edges = ops.bitset_similarity_edges(a, other, metric, threshold=threshold)
            assert_same_edges(edges, thresholded(dense, threshold, pairs))

    @pytest.mark.parametrize("common", range(1, 11))
    def test_tie_at_the_threshold(self, common, device):
        # The float64 quotient decides: as float32 it may lie on either side of the threshold.
        bits = torch.zeros(2, 100, dtype=torch.bool, device=device)
        bits[0, :common] = True
        bits[1, :10] = True
        a = ops.bitset_pack(bits)
        tie = common / 10
        for threshold, count in (
            (math.nextafter(tie, 0), 1),
            (tie, 1),
            (math.nextafter(tie, 2), 0),
        ):
            edges = ops.bitset_similarity_edges(a, None, "jaccard", threshold=threshold)
            assert edges.rows.numel() == count

    @pytest.mark.parametrize("metric", SET_METRICS)
    @pytest.mark.parametrize("k", [1, 7, 500])
    def test_neighbours_are_those_of_the_dense_result(self, k, metric, device):
        bits = random_sets(450, 40, device)  # more than one tile, and few enough elements for ties
        a, b = ops.bitset_pack(bits), ops.bitset_pack(bits[20:440])
        for other in (None, b):
            dense = ops.bitset_similarity(a, other, metric)
            got = ops.bitset_similarity_topk(a, other, metric, k=k)
            assert_nearest(got, dense, k, own=other is None)

    @pytest.mark.parametrize("metric", SET_METRICS)
    @pytest.mark.parametrize("size", [3, 100, 1000, 32752, 70_000])
    def test_same_bits_on_every_instruction_set(self, size, metric, each_capability):
        # 32752 elements are the most that 16 bits hold; sets beyond come in several pieces.
        rows = 400 if size <= 1000 else 21
        bits = random_sets(rows, size)
        a, b = ops.bitset_pack(bits), ops.bitset_pack(bits[5:19])
        small, other = bits[:20], bits[5:19]
        expected = reference.set_similarity(small, other, metric).float()
        results = []
        for name in each_capability:
            _C.set_cpu_capability(name)
            dense = ops.bitset_similarity(a, None, metric)
            edges = ops.bitset_similarity_edges(a, None, metric, threshold=0.3)
            assert_nearest(ops.bitset_similarity_topk(a, None, metric, k=4), dense, 4, own=True)
            pairs = "distinct" if metric == "containment" else "upper"
            assert_same_edges(edges, thresholded(dense, 0.3, pairs))
            assert same_bits(ops.bitset_similarity(a[:20], b, metric), expected)
            results.append(dense)
        for result in results[1:]:
            assert same_bits(results[0], result)

    @pytest.mark.parametrize("metric", SET_METRICS)
    def test_large_sets_and_small_ones(self, metric, device):
        # More elements than 16 bits count, on one side only.
        large, small = random_sets(5, 70_000, device), random_sets(6, 70_000, device)
        small[:, 100:] = False
        for left, right in ((large, small), (small, large)):
            a, b = ops.bitset_pack(left), ops.bitset_pack(right)
            expected = reference.set_similarity(left.cpu(), right.cpu(), metric)
            assert same_bits(ops.bitset_similarity(a, b, metric).cpu(), expected.float())
            edges = ops.bitset_similarity_edges(a, b, metric, threshold=1e-4)
            assert edges.rows.numel() == (expected >= 1e-4).sum()

    def test_fewer_neighbours_than_asked_for(self, device):
        sets = ops.bitset_pack(random_sets(3, 70, device))
        got = ops.bitset_similarity_topk(sets, None, k=5)
        assert (got.cols[:, 2:] == -1).all()
        assert got.values[:, 2:].isnan().all()
        for rows in (sets[:0], sets[:1]):
            for other in (None, sets[:0]):
                got = ops.bitset_similarity_topk(rows, other, k=2)
                assert got.cols.tolist() == [[-1, -1]] * len(rows)
                assert got.values.isnan().all()

    def test_same_bits_twice_and_at_any_thread_count(self, device):
        a = ops.bitset_pack(random_sets(600, 100, device))
        one_nearest = ops.bitset_similarity_topk(a, k=9)
        for count in (1, 2, 3):
            with num_threads(count):
                nearest = ops.bitset_similarity_topk(a, k=9)
                assert torch.equal(one_nearest.cols, nearest.cols)
                assert same_bits(one_nearest.values, nearest.values)
        with num_threads(1):
            one = ops.bitset_similarity(a)
            one_edges = ops.bitset_similarity_edges(a, threshold=0.5)
            assert same_bits(one, ops.bitset_similarity(a))
        with num_threads(2):
            assert same_bits(one, ops.bitset_similarity(a))
            assert_same_edges(one_edges, ops.bitset_similarity_edges(a, threshold=0.5))


class TestRows:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("metric", ROW_METRICS)
    def test_equals_the_oracle(self, metric, layout, dtype, device):
        a = layouts((23, 67), dtype, device)[layout]
        b = layouts((11, 67), dtype, device)[layout]
        a_plain, b_plain = a.detach().cpu(), b.detach().cpu()
        for other, plain in ((b, b_plain), (None, a_plain)):
            expected = reference.pairwise_similarity(a_plain, plain, metric)
            scale = product_scale(a_plain, plain, metric)
            assert_similar(ops.pairwise_similarity(a, other, metric), expected, dtype, scale)

    @given(
        st.integers(0, 6),
        st.integers(0, 6),
        st.integers(0, 5),
        st.sampled_from(ROW_METRICS),
        st.sampled_from([torch.float64, torch.float32]),
    )
    def test_any_shape(self, rows, cols, size, metric, dtype):
        a = torch.randint(-2, 3, (rows, size)).to(dtype)  # rows of zeros and constants among them
        b = torch.randint(-2, 3, (cols, size)).to(dtype)
        assert_similar(
            ops.pairwise_similarity(a, b, metric),
            reference.pairwise_similarity(a, b, metric),
            dtype,
            product_scale(a, b, metric),
        )
        for other in (None, b):
            dense = ops.pairwise_similarity(a, other, metric)
            edges = ops.pairwise_similarity_edges(a, other, metric, threshold=0.4)
            pairs = "upper" if other is None else "all"
            assert_same_edges(edges, thresholded(dense, 0.4, pairs))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("metric", UNIT_METRICS)
    @pytest.mark.parametrize("rows", [5, 300, 520])
    def test_self_similarity(self, rows, metric, dtype, device):
        a = torch.randn(rows, 19, device=device).to(dtype)
        a[1] = 0
        dense = ops.pairwise_similarity(a, None, metric)
        assert torch.equal(dense, dense.t())
        expected = torch.ones_like(dense[0])
        expected[1] = 0
        assert torch.equal(dense.diagonal(), expected)
        assert (dense[1] == 0).all()
        assert dense.abs().max() <= 1
        torch.testing.assert_close(
            dense, ops.pairwise_similarity(a, a, metric), rtol=0, atol=tolerance(dtype)
        )

    @pytest.mark.parametrize("metric", ROW_METRICS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("threshold", [-math.inf, -0.3, 0.0, 0.2, 1.0, math.inf])
    def test_edges_equal_the_thresholded_dense_result(self, threshold, dtype, metric, device):
        a = torch.randn(530, 24, dtype=dtype, device=device)  # more than one tile
        b = torch.randn(270, 24, dtype=dtype, device=device)
        for other, pairs in ((None, "upper"), (b, "all")):
            dense = ops.pairwise_similarity(a, other, metric)
            edges = ops.pairwise_similarity_edges(a, other, metric, threshold=threshold)
            assert_same_edges(edges, thresholded(dense, threshold, pairs))

    @pytest.mark.parametrize("metric", ROW_METRICS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("k", [1, 6, 600])
    def test_neighbours_are_those_of_the_dense_result(self, k, dtype, metric, device):
        a = torch.randn(530, 24, dtype=dtype, device=device)  # more than one tile
        a[500:] = a[:30]  # ties, over tiles
        a[7] = 0
        b = a[200:470].clone()
        for other in (None, b):
            dense = ops.pairwise_similarity(a, other, metric)
            got = ops.pairwise_similarity_topk(a, other, metric, k=k)
            assert_nearest(got, dense, k, own=other is None)

    def test_equal_rows_have_the_first_as_neighbours(self, device):
        a = torch.ones(700, 3, device=device)
        got = ops.pairwise_similarity_topk(a, k=4)
        assert got.cols[0].tolist() == [1, 2, 3, 4]
        assert got.cols[2].tolist() == [0, 1, 3, 4]
        assert (got.cols[5:] == torch.arange(4, device=device)).all()

    def test_nearest_rows_of_other_rows(self, device):
        a = torch.tensor([[1.0, 0], [0, -2]], device=device)
        b = torch.tensor([[0.0, 1], [3, 3], [5, 0]], device=device)
        got = ops.pairwise_similarity_topk(a, b, k=2)
        assert got.cols.tolist() == [[2, 1], [2, 1]]
        assert got.values[1, 0] == 0

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("metric", ROW_METRICS)
    def test_same_bits_on_every_instruction_set(self, metric, dtype, each_capability):
        a = torch.randn(400, 37).to(dtype)
        a[13, 2] = torch.nan
        a[14, 35] = torch.inf
        a[200:300] = a[:100]
        results = []
        for name in each_capability:
            _C.set_cpu_capability(name)
            edges = ops.pairwise_similarity_edges(a, None, metric, threshold=0.2)
            results.append((*edges, *ops.pairwise_similarity_topk(a, None, metric, k=5)))
        for result in results[1:]:
            assert all(map(same_bits, results[0], result))

    def test_tie_at_the_threshold(self, device):
        a = torch.tensor([[0.0, 2], [3, 0], [0, 5], [-1, 0]], device=device)
        edges = ops.pairwise_similarity_edges(a, threshold=1.0)
        assert (edges.rows.tolist(), edges.cols.tolist()) == ([0], [2])
        edges = ops.pairwise_similarity_edges(a, threshold=0.0)
        assert edges.rows.tolist() == [0, 0, 0, 1, 2]
        assert edges.cols.tolist() == [1, 2, 3, 2, 3]
        assert ops.pairwise_similarity_edges(a, threshold=math.nextafter(1, 2)).rows.numel() == 0

    @pytest.mark.parametrize("scale", [1e300, 1e-300, 1e-320])
    @pytest.mark.parametrize("metric", UNIT_METRICS)
    def test_scale_does_not_matter(self, metric, scale, device):
        a = torch.randint(-9, 10, (6, 8), dtype=torch.float64, device=device)
        expected = reference.pairwise_similarity(a.cpu(), a.cpu(), metric)
        got = ops.pairwise_similarity(a * scale, None, metric)
        # The smallest scale leaves a value four digits.
        atol = 1e-3 if scale < 1e-300 else 1e-13
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=atol)

    def test_dot_is_the_product(self, device):
        a = torch.randint(-9, 10, (700, 33), device=device).float()
        a[3] = 0
        product = (a.double() @ a.double().t()).float()  # small integers: exact
        assert torch.equal(ops.pairwise_similarity(a, None, "dot"), product)
        assert torch.equal(ops.pairwise_similarity(a.bfloat16(), a.bfloat16(), "dot"), product)
        a[5, 2] = torch.inf
        got = ops.pairwise_similarity(a, None, "dot")
        assert same_bits(got, got.t())
        assert got[5, 5] == torch.inf
        assert got[3, 5].isnan()
        nearest = ops.pairwise_similarity_topk(a, None, "dot", k=3)
        assert_nearest(nearest, got, 3, own=True)
        edges = ops.pairwise_similarity_edges(a, None, "dot", threshold=50)
        assert_same_edges(edges, thresholded(got, 50, "upper"))

    def test_pearson_ignores_the_offset(self, device):
        a = torch.randint(-9, 10, (6, 8), dtype=torch.float64, device=device)
        got = ops.pairwise_similarity(a + 1e9, a, "pearson")
        torch.testing.assert_close(
            got, ops.pairwise_similarity(a, a, "pearson"), rtol=0, atol=1e-13
        )
        assert (ops.pairwise_similarity(torch.full_like(a, 0.1), a, "pearson") == 0).all()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("metric", UNIT_METRICS)
    def test_nonfinite_row_gives_nan_and_no_edge(self, metric, bad, device):
        a = torch.randn(300, 9, device=device)
        clean = ops.pairwise_similarity(a, None, metric)
        a[7, 3] = bad
        a[8] = 0
        got = ops.pairwise_similarity(a, None, metric)
        others = [i for i in range(300) if i not in (7, 8)]
        assert got[7].isnan().all()
        assert got[:, 7].isnan().all()
        assert same_bits(got[others][:, others], clean[others][:, others])
        edges = ops.pairwise_similarity_edges(a, None, metric, threshold=-2)
        assert edges.rows.numel() == 299 * 298 // 2
        assert 7 not in edges.rows
        assert 7 not in edges.cols
        nearest = ops.pairwise_similarity_topk(a, None, metric, k=298)
        assert_nearest(nearest, got, 298, own=True)
        assert (nearest.cols[7] == -1).all()
        assert (nearest.cols[others] >= 0).all()

    # In these shapes BLAS divides the sum over D among threads, if it is left to.
    @pytest.mark.parametrize(
        "shape", [(7, 300, 1000), (7, 255, 5001), (15, 15, 5001), (300, 600, 40), (1, 1, 9000)]
    )
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_same_bits_twice_and_at_any_thread_count(self, dtype, shape):
        rows, cols, size = shape
        a, b = torch.randn(rows, size, dtype=dtype), torch.randn(cols, size, dtype=dtype)
        for other in (None, b):
            with num_threads(1):
                one = ops.pairwise_similarity(a, other)
                one_edges = ops.pairwise_similarity_edges(a, other, threshold=0.01)
                one_nearest = ops.pairwise_similarity_topk(a, other, k=3)
                assert same_bits(one, ops.pairwise_similarity(a, other))
            for count in (2, 3):
                with num_threads(count):
                    assert same_bits(one, ops.pairwise_similarity(a, other))
                    edges = ops.pairwise_similarity_edges(a, other, threshold=0.01)
                    assert_same_edges(one_edges, edges)
                    nearest = ops.pairwise_similarity_topk(a, other, k=3)
                    assert all(map(same_bits, one_nearest, nearest))

    @pytest.mark.slow
    def test_neighbours_of_many_rows_within_a_gibibyte(self):
        # The matrix of pairs would take 37 GiB. A process of its own, because the peak is its own;
        # what getrusage tells may be that of the process that started it.
        code = """
import torch
from neusemslice import ops
x = torch.randn(100_000, 8).bfloat16()
got = ops.pairwise_similarity_topk(x, k=4)
some = torch.arange(0, 100_000, 9973)
exact = torch.nn.functional.normalize(x[some].double()) @ torch.nn.functional.normalize(
    x.double()
).t()
exact[torch.arange(len(some)), some] = -2
torch.testing.assert_close(
    got.values[some].double(), exact.topk(4).values, rtol=0, atol=2e-6
)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert int(ran.stdout) < 2**20  # KiB

    def test_same_bits_twice_on_the_device(self, device):
        a = torch.randn(130, 70, device=device)
        assert same_bits(ops.pairwise_similarity(a), ops.pairwise_similarity(a))
