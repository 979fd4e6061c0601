"""gram_ against a float64 oracle, its contract, and laws."""

import pytest
import torch
from helpers import cuda_implementation, layouts, num_threads, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from neusemslice import ops, reference
from neusemslice.ops import Gram

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (5, 3), (700, 67), (1100, 401), (3, 0), (0, 4)]


def gram(*parts: torch.Tensor) -> Gram:
    state = Gram.empty(parts[0].shape[1], parts[0].device)
    for x in parts:
        ops.gram_(state, x)
    return state


def assert_matches(state: Gram, x: torch.Tensor) -> None:
    """Products are of float32 sums of up to 512 terms: rounding of 512 halves of a unit at most."""
    count, mean, products = reference.gram(x.detach().cpu())
    assert float(state.count) == float(count)
    torch.testing.assert_close(state.mean.cpu(), mean, rtol=1e-12, atol=1e-12)
    spread = products.diagonal().sqrt()
    unit = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    allowed = 32 * unit * spread.unsqueeze(1) * spread + 1e-12
    assert ((state.products.cpu() - products).abs() <= allowed).all()
    assert torch.equal(state.products, state.products.t())


class TestValues:
    @pytest.mark.parametrize("layout", ["contiguous", "sliced", "permuted", "requires_grad"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equals_the_oracle(self, shape, dtype, layout, device):
        x = layouts(shape, dtype, device)[layout]
        assert_matches(gram(x), x)

    def test_batches_equal_all_at_once(self, device):
        x = torch.randn(900, 40, device=device) + torch.linspace(-3, 30, 40, device=device)
        assert_matches(gram(*x.split([1, 400, 0, 499])), x)

    def test_a_mean_far_from_zero_costs_no_digits(self, device):
        x = torch.randn(2000, 20, device=device) + 10_000
        assert_matches(gram(*x.split(300)), x)

    def test_constant_features_have_no_spread(self, device):
        x = torch.full((600, 5), 0.1, device=device)
        assert torch.equal(gram(x).products, torch.zeros_like(gram(x).products))

    def test_nonfinite_values_spread_to_their_feature_only(self, device):
        x = torch.randn(50, 6, device=device)
        x[7, 2] = torch.nan
        products = gram(x).products
        assert products[2].isnan().all()
        others = [0, 1, 3, 4, 5]
        assert_matches(
            Gram(gram(x).count, gram(x).mean[others], products[others][:, others]), x[:, others]
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_the_cuda_implementation_on_the_cpu(self, shape, dtype):
        x = (torch.randn(shape) + 3).to(dtype)
        state = Gram.empty(shape[1])
        for part in x.split([shape[0] // 3, shape[0] - shape[0] // 3]):
            tensors = (state.count, state.mean, state.products)
            cuda_implementation("gram_", *tensors, part)
        assert_matches(state, x)

    @given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), features=st.integers(1, 9))
    def test_any_split_gives_the_same(self, sizes, features):
        x = torch.randn(sum(sizes), features) * 3 + 1
        assert_matches(gram(*x.split(sizes)), x)


class TestContract:
    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_same_bits_at_any_number_of_threads(self, threads):
        x = torch.randn(1500, 900)
        expected = gram(x, x)
        with num_threads(threads):
            got = gram(x, x)
        assert same_bits(got.products, expected.products)
        assert same_bits(got.mean, expected.mean)

    def test_autocast_changes_nothing(self):
        x = torch.randn(100, 30)
        with torch.autocast("cpu", torch.bfloat16):
            got = gram(x)
        assert same_bits(got.products, gram(x).products)

    @pytest.mark.parametrize("layout", ["contiguous", "sliced", "permuted", "requires_grad"])
    def test_opcheck(self, layout, device):
        x = layouts((7, 5), torch.float32, device)[layout]
        state = Gram.empty(5, device)
        opcheck(torch.ops.neusemslice.gram_, (state.count, state.mean, state.products, x))

    def test_compiles_without_a_break(self, device):
        x = torch.randn(30, 8, device=device)

        def twice(state: Gram, x: torch.Tensor) -> torch.Tensor:
            ops.gram_(state, x)
            ops.gram_(state, 2 * x)
            return state.products / state.count

        compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(Gram.empty(8, device), x), twice(Gram.empty(8, device), x))

    def test_a_stale_graph_is_noticed(self):
        state = Gram.empty(3)
        weight = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
        loss = (state.products * weight).sum()
        ops.gram_(state, torch.randn(4, 3))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize(
        ("changed", "value", "error", "message"),
        [
            ("x", torch.zeros(4), ValueError, r"x must have shape \[N, F\], got float32 \[4\]"),
            ("x", torch.zeros(2, 3, dtype=torch.int64), TypeError, "x must be float64, float32"),
            ("x", torch.zeros(2, 4), ValueError, r"mean must have shape \[4\], got float64 \[3\]"),
            ("count", torch.zeros(1, dtype=torch.float64), ValueError, r"count must have shape"),
            ("mean", torch.zeros(3), TypeError, "mean must be float64, got float32"),
            (
                "products",
                torch.zeros(3, 6, dtype=torch.float64)[:, ::2],
                ValueError,
                "products must be contiguous",
            ),
        ],
    )
    def test_refuses(self, changed, value, error, message):
        state = Gram.empty(3)
        x = value if changed == "x" else torch.ones(2, 3)
        if changed != "x":
            setattr(state, changed, value)
        before = [t.clone() for t in (state.count, state.mean, state.products)]
        with pytest.raises(error, match=f"gram_: {message}"):
            ops.gram_(state, x)
        after = (state.count, state.mean, state.products)
        assert all(map(torch.equal, before, after))

    def test_refuses_a_negative_size(self):
        with pytest.raises(ValueError, match="features must be at least 0, got -1"):
            Gram.empty(-1)
