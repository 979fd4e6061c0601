"""Gradients of tuned rows against torch's own, contracts, laws and derivatives."""

from functools import partial

import pytest
import torch
from helpers import cuda_implementation, layouts, num_threads, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from neusemslice import _C, ops

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "sliced", "permuted", "expanded", "requires_grad"]
NAMES = "kernel_size stride padding dilation"


def rows_of(size, count, device="cpu"):
    return torch.randperm(size)[:count].sort().values.to(device)


def conv_gradient(grad, x, kernel_size, stride, padding, dilation, groups):
    """The whole weight's gradient, in float64 by torch."""
    weight = grad.new_empty(grad.shape[1], x.shape[1] // groups, *kernel_size).double()
    where = (stride, padding, dilation, False, [0] * len(stride), groups)
    return torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight, None, *where, [False, True, False]
    )[1]


def conv_case(size=(5, 6, 8, 9, 7), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1),
              groups=1, dtype=torch.float32, device="cpu"):  # fmt: skip
    """grad, x and the options of a convolution; `size` is samples, inputs, outputs, then space."""
    samples, inputs, outputs, *space = size
    x = torch.randn(samples, inputs, *space, dtype=torch.float64)
    weight = x.new_zeros(outputs, inputs // groups, *kernel)
    y = torch.convolution(
        x, weight, None, stride, padding, dilation, False, [0] * len(space), groups
    )
    grad = torch.randn(y.shape, dtype=torch.float64)
    options = (list(kernel), list(stride), list(padding), list(dilation), groups)
    return grad.to(device, dtype), x.to(device, dtype), options


def assert_close(found, expected, x_dtype, terms):
    """Sums of `terms` products, rounded once to the dtype.

    Such a sum grows like the root of its terms, and as many roundings of that size add up to
    `terms` times the unit of the last place.
    """
    assert found.dtype == x_dtype
    eps = torch.finfo(torch.float64 if x_dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(
        found.double(), expected, rtol=torch.finfo(x_dtype).eps, atol=2 * eps * terms
    )


def norm_case(shape, dtype=torch.float32, device="cpu", of=torch.float32):
    """Mean and variance of ``shape``'s channels, and rows of a weight and of a bias."""
    channels = shape[1]
    mean, var = torch.randn(channels, dtype=of), torch.rand(channels, dtype=of) + 0.5
    rows, bias_rows = rows_of(channels, channels // 2, device), rows_of(channels, 2, device)
    return mean.to(device), var.to(device), 1e-3, rows, bias_rows


def norm_gradients(grad, x, mean, var, eps, rows, bias_rows):
    """Both gradients in float64, of the rows."""
    shape = (-1, *[1] * (x.dim() - 2))
    mean, var = mean.double().view(shape), var.double().view(shape)
    normal = (x.double() - mean) / (var + eps).sqrt()
    others = [d for d in range(x.dim()) if d != 1]
    return (grad.double() * normal).sum(others)[rows], grad.double().sum(others)[bias_rows]


class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_linear(self, dtype, layout, device):
        for shape, inputs in [((9, 7), 200), ((2, 3, 5), 4), ((6,), 3), ((4, 1, 1, 5), 450)]:
            grad = layouts(shape, dtype, device)[layout] if len(shape) > 1 else (
                torch.randn(shape, device=device).to(dtype))  # fmt: skip
            x = layouts((*shape[:-1], inputs), dtype, device)[layout]
            rows = rows_of(shape[-1], 3, device)
            found = ops.rows_linear_backward(grad, x, rows)
            flat = grad.double().reshape(-1, shape[-1])
            expected = flat.t() @ x.double().reshape(-1, inputs)
            assert_close(found, expected[rows], dtype, len(flat))
            assert found.is_contiguous()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_conv(self, dtype, layout, device):
        _, _, options = conv_case()
        x = layouts((5, 6, 9, 7), dtype, device)[layout]
        grad = layouts((5, 8, 9, 7), dtype, device)[layout]
        rows = rows_of(8, 5, device)
        found = ops.rows_conv_backward(grad, x, rows, *options)
        assert_close(found, conv_gradient(grad, x, *options)[rows], dtype, 5 * 63)
        assert found.is_contiguous()

    # Of the second all threads have samples to make planes of, in whole blocks and what is left.
    @pytest.mark.parametrize("size", [(5, 6, 8, 9, 7), (50, 6, 8, 12, 11)], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_conv_has_the_same_bits_in_channels_last(self, dtype, size, device):
        grad, x, options = conv_case(size, groups=2, dtype=dtype, device=device)
        rows = rows_of(8, 4, device)
        found = ops.rows_conv_backward(grad, x, rows, *options)
        expected = conv_gradient(grad, x, *options)[rows]
        for a, b in [(True, False), (False, True), (True, True)]:
            g = grad.contiguous(memory_format=torch.channels_last) if a else grad
            i = x.contiguous(memory_format=torch.channels_last) if b else x
            again = ops.rows_conv_backward(g, i, rows, *options)
            if device.type == "cpu":
                assert same_bits(again, found)
            assert_close(again, expected, dtype, grad[:, 0].numel())

    @given(st.data())
    def test_any_convolution(self, data):
        def some(low, high):
            return data.draw(st.integers(low, high))

        space = some(1, 3)
        kernel = [some(1, 4) for _ in range(space)]
        stride, dilation = ([some(1, 3) for _ in range(space)] for _ in range(2))
        padding = [some(0, 3) for _ in range(space)]
        groups = some(1, 3)
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        size = (
            some(1, 20),
            groups * some(1, 4),
            groups * some(1, 3),
            *(r + some(0, 6) for r in reach),
        )
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        grad, x, options = conv_case(size, kernel, stride, padding, dilation, groups, dtype)
        rows = rows_of(size[2], some(0, size[2]))
        expected = conv_gradient(grad, x, *options)[rows]
        terms = max(1, grad.numel() // grad.shape[1])
        assert_close(ops.rows_conv_backward(grad, x, rows, *options), expected, dtype, terms)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_bias(self, dtype, layout, dim, device):
        grad = layouts((6, 7, 40), dtype, device)[layout]
        rows = rows_of(grad.shape[dim], 4, device)
        others = [d for d in range(3) if d != dim % 3]
        expected = grad.double().sum(others)[rows]
        assert_close(ops.rows_bias_backward(grad, rows, dim), expected, dtype, 280)

    def test_bias_has_the_same_bits_in_channels_last(self, device):
        grad, rows = torch.randn(6, 7, 5, 4, device=device), rows_of(7, 3, device)
        last = grad.contiguous(memory_format=torch.channels_last)
        found = ops.rows_bias_backward(last, rows, 1)
        assert torch.equal(found, ops.rows_bias_backward(grad, rows, 1))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_norm(self, dtype, layout, device):
        of = torch.promote_types(dtype, torch.float32)
        for shape in [(9, 7), (5, 6, 8), (3, 5, 9, 7), (2, 4, 3, 5, 6)]:
            grad, x = (layouts(shape, dtype, device)[layout] for _ in range(2))
            given = norm_case(shape, dtype, device, of)
            found = ops.rows_norm_backward(grad, x, *given)
            expected = norm_gradients(grad, x, *given)
            for a, b in zip(found, expected, strict=True):
                assert_close(a, b, of, 8 * grad[:, 0].numel())

    def test_norm_of_many_samples_in_channels_last(self, device):
        shape = (41, 16, 35, 33)  # of several parts
        grad, x = (torch.randn(shape, device=device) for _ in range(2))
        given = norm_case(shape, device=device)
        expected = norm_gradients(grad, x, *given)
        for last in (False, True):
            form = torch.channels_last if last else torch.contiguous_format
            found = ops.rows_norm_backward(
                grad.contiguous(memory_format=form), x.contiguous(memory_format=form), *given
            )
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-2)

    def test_norm_of_half_precision_with_statistics_of_its_own(self, device):
        grad, x = (torch.randn(6, 4, 5, device=device).bfloat16() for _ in range(2))
        given = norm_case(x.shape, torch.bfloat16, device, torch.bfloat16)
        found = ops.rows_norm_backward(grad, x, *given)
        for a, b in zip(found, norm_gradients(grad, x, *given), strict=True):
            assert_close(a, b, torch.bfloat16, 240)

    def test_what_is_empty(self, device):
        def zeros(*shape):
            return torch.zeros(shape, device=device)

        none, one = torch.zeros(0, dtype=torch.int64, device=device), rows_of(1, 1, device)
        assert ops.rows_linear_backward(zeros(4, 3), zeros(4, 2), none).shape == (0, 2)
        assert ops.rows_linear_backward(zeros(0, 3), zeros(0, 2), one).tolist() == [[0, 0]]
        assert ops.rows_linear_backward(zeros(4, 3), zeros(4, 0), one).shape == (1, 0)
        where = ([2], [1], [0], [1], 1)
        assert ops.rows_conv_backward(zeros(2, 3, 4), zeros(2, 2, 5), none, *where).shape == (
            0,
            2,
            2,
        )
        for samples, places in [(0, 5), (2, 1), (2, 0)]:
            grad, x = zeros(samples, 3, max(0, places - 1)), zeros(samples, 2, places)
            assert not ops.rows_conv_backward(grad, x, one, *where).any()
        assert ops.rows_bias_backward(zeros(4, 3, 0), one, 1).tolist() == [0]
        assert ops.rows_bias_backward(zeros(4, 3), none, 1).shape == (0,)
        for shape in [(0, 3, 2), (4, 3, 0), (4, 3, 2)]:
            given = (zeros(*shape), zeros(*shape), zeros(3), zeros(3), 1e-3)
            of_rows, of_bias = ops.rows_norm_backward(*given, one, none)
            assert of_rows.tolist() == [0]
            assert of_bias.shape == (0,)


class TestCudaImplementation:
    """On the CPU's tensors, which the operators that it is made of take as well."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_linear_and_bias(self, layout):
        grad, x = (layouts((4, 3, n), torch.float32, "cpu")[layout] for n in (9, 70))
        rows = rows_of(9, 4)
        expected = grad.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
        assert_close(
            cuda_implementation("rows_linear_backward", grad, x, rows), expected[rows], x.dtype, 12
        )
        found = cuda_implementation("rows_bias_backward", grad, rows, -1)
        assert_close(found, grad.double().sum((0, 1))[rows], x.dtype, 12)

    # All channels for each row, a group for each row, and the whole gradient: see its header.
    @pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 12])
    @pytest.mark.parametrize("groups", [1, 2, 4, 12])
    def test_conv(self, groups, count):
        grad, x, options = conv_case(
            (5, 12, 12, 9, 7), (3, 2), (2, 1), (1, 1), (1, 2), groups, torch.float64
        )
        rows = rows_of(12, count)
        found = cuda_implementation("rows_conv_backward", grad, x, rows, *options)
        assert found.is_contiguous()
        assert_close(found, conv_gradient(grad, x, *options)[rows], x.dtype, grad[:, 0].numel())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_norm(self, layout, dtype):
        of = torch.promote_types(dtype, torch.float32)
        grad, x = (layouts((5, 8, 9, 7), dtype, "cpu")[layout] for _ in range(2))
        given = norm_case(x.shape, dtype, of=of)
        found = cuda_implementation("rows_norm_backward", grad, x, *given)
        for a, b in zip(found, norm_gradients(grad, x, *given), strict=True):
            assert_close(a, b, of, 8 * grad[:, 0].numel())

    def test_what_is_empty(self):
        one, where = rows_of(1, 1), ([2], [1], [0], [1], 1)
        for samples, places in [(0, 5), (2, 1), (2, 0)]:
            grad, x = torch.zeros(samples, 3, max(0, places - 1)), torch.zeros(samples, 2, places)
            found = cuda_implementation("rows_conv_backward", grad, x, one, *where)
            assert found.shape == (1, 2, 2)
            assert not found.any()


class TestDeterminism:
    def cases(self, dtype):
        torch.manual_seed(3)
        grad, x, options = conv_case((40, 5, 7, 9, 8), dtype=dtype)
        rows = rows_of(7, 4)
        last_x = x.contiguous(memory_format=torch.channels_last)
        yield lambda: ops.rows_conv_backward(grad, x, rows, *options)
        yield lambda: ops.rows_conv_backward(grad, last_x, rows, *options)
        yield lambda: ops.rows_bias_backward(grad, rows, 1)
        flat_grad, flat_x = torch.randn(5000, 33).to(dtype), torch.randn(5000, 200).to(dtype)
        flat_rows = rows_of(33, 8)
        yield lambda: ops.rows_linear_backward(flat_grad, flat_x, flat_rows)
        for shape in [(40, 16, 30, 32), (1, 16, 64, 64)]:
            maps = torch.randn(2, *shape).to(dtype)
            given = norm_case(shape)
            for form in (torch.contiguous_format, torch.channels_last):
                of, read = (t.contiguous(memory_format=form) for t in maps)
                yield partial(
                    lambda *args: torch.cat(ops.rows_norm_backward(*args)), of, read, *given
                )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_same_bits_twice_and_at_any_thread_count(self, dtype):
        for run in self.cases(dtype):
            first = run()
            for threads in (1, 2, 3):
                with num_threads(threads):
                    assert same_bits(run(), first)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_instruction_set_gives_the_same_bits(self, dtype, each_capability):
        for run in list(self.cases(dtype))[:3]:
            results = []
            for name in each_capability:
                _C.set_cpu_capability(name)
                results.append(run())
            for other in results[1:]:
                assert same_bits(results[0], other)


class TestContract:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"grad": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "grad must be float64"),
            ({"x": torch.zeros(2, 4).double()}, TypeError, "x must be float32, got float64"),
            ({"x": torch.zeros(3, 4)}, ValueError, r"x must be \[..., I\] for grad \[2, 3\]"),
            ({"rows": torch.zeros(1)}, TypeError, "rows must be int64, got float32"),
            ({"rows": torch.zeros(1, 1).long()}, ValueError, r"rows must be int64 \[R\]"),
            ({"rows": torch.tensor([0, 3])}, ValueError, r"lie in \[0, 3\), got 3 at index 1"),
            ({"rows": torch.tensor([-1])}, ValueError, r"lie in \[0, 3\), got -1 at index 0"),
            ({"rows": torch.tensor([1, 1])}, ValueError, "rise without repeats, got 1 after 1"),
        ],
    )
    def test_linear_refuses(self, change, error, message):
        given = {"grad": torch.zeros(2, 3), "x": torch.zeros(2, 4), "rows": torch.tensor([1])}
        with pytest.raises(error, match=f"rows_linear_backward: .*{message}"):
            ops.rows_linear_backward(**given | change)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.zeros(2, 3)}, ValueError, "one to three spatial dimensions"),
            ({"x": torch.zeros(3, 4, 6)}, ValueError, r"grad must be \[N, O, ...\] as x is"),
            ({"grad": torch.zeros(2, 6, 7)}, ValueError, "grad must have 6 places in dimension 2"),
            ({"groups": 3}, ValueError, "groups must divide the channels of x and grad, 4 and 6"),
            ({"stride": [1, 1]}, ValueError, "stride must have 1 entries"),
            ({"stride": [0]}, ValueError, r"stride must be at least 1, got \[0\]"),
            ({"padding": [-1]}, ValueError, "padding must be at least 0"),
            ({"rows": torch.tensor([6])}, ValueError, r"lie in \[0, 6\), got 6"),
        ],
    )
    def test_conv_refuses(self, change, error, message):
        given = {
            "grad": torch.zeros(2, 6, 6),
            "x": torch.zeros(2, 4, 6),
            "rows": torch.tensor([1]),
            **dict(zip(NAMES.split(), ([3], [1], [1], [1]), strict=True)),
            "groups": 2,
        }
        with pytest.raises(error, match=f"rows_conv_backward: .*{message}"):
            ops.rows_conv_backward(**given | change)

    def test_bias_refuses(self):
        rows = torch.tensor([1])
        with pytest.raises(ValueError, match=r"neuron_dim must name a dimension of grad .*got 2"):
            ops.rows_bias_backward(torch.zeros(2, 3), rows, 2)
        with pytest.raises(ValueError, match=r"rows_bias_backward: rows must lie in \[0, 1\)"):
            ops.rows_bias_backward(torch.zeros(2, 1), rows, 1)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"grad": torch.zeros(2), "x": torch.zeros(2)}, ValueError, r"must be \[N, C, "),
            ({"x": torch.zeros(2, 3, 5)}, ValueError, r"x must have shape \[2, 3, 4\]"),
            ({"x": torch.zeros(2, 3, 4).double()}, TypeError, "x must be float32, got float64"),
            ({"mean": torch.zeros(3).long()}, TypeError, "mean must be float64"),
            ({"mean": torch.zeros(4)}, ValueError, r"mean must have shape \[3\]"),
            ({"var": torch.zeros(3).double()}, TypeError, "var must be float32, got float64"),
            ({"rows": torch.tensor([3])}, ValueError, r"rows must lie in \[0, 3\), got 3"),
            ({"bias_rows": torch.zeros(1)}, TypeError, "bias_rows must be int64"),
            ({"bias_rows": torch.tensor([2, 1])}, ValueError, "bias_rows must rise"),
        ],
    )
    def test_norm_refuses(self, change, error, message):
        given = {
            **dict.fromkeys(("grad", "x"), torch.zeros(2, 3, 4)),
            **dict.fromkeys(("mean", "var"), torch.zeros(3)),
            "eps": 1e-3,
            **dict.fromkeys(("rows", "bias_rows"), torch.tensor([1])),
        }
        with pytest.raises(error, match=f"rows_norm_backward: .*{message}"):
            ops.rows_norm_backward(**given | change)

    def test_mixed_devices_are_refused(self):
        grad, rows = torch.zeros(2, 3), torch.tensor([1])
        with pytest.raises(ValueError, match="must be on one device, got cpu and meta"):
            ops.rows_linear_backward(grad, torch.zeros(2, 4, device="meta"), rows)
        of = torch.zeros(3, device="meta")
        with pytest.raises(ValueError, match="must be on one device, got cpu and meta"):
            ops.rows_norm_backward(grad, grad, of, of, 1e-3, rows, rows)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_opcheck(self, layout, device):
        rows = rows_of(6, 3, device)
        named = torch.ops.neusemslice
        for shape in [(5, 6), (2, 3, 6), (0, 6)]:
            grad = layouts(shape, torch.float32, device)[layout]
            x = layouts((*shape[:-1], 4), torch.float32, device)[layout]
            opcheck(named.rows_linear_backward, (grad, x, rows))
            opcheck(named.rows_bias_backward, (grad, rows, -1))
        grad = layouts((3, 6, 4, 4), torch.float32, device)[layout]
        x = layouts((3, 4, 8, 8), torch.float32, device)[layout]
        where = ([3, 3], [2, 2], [1, 1], [1, 1], 2)
        opcheck(named.rows_conv_backward, (grad, x, rows, *where))
        opcheck(named.rows_bias_backward, (grad, rows, 1))
        x = layouts((3, 6, 4, 4), torch.float32, device)[layout]
        opcheck(named.rows_norm_backward, (grad, x, *norm_case(x.shape, device=device)))

    def test_compiled_as_one_graph(self, device):
        grad, x, options = conv_case(device=device)
        rows = rows_of(8, 3, device)
        narrow = rows_of(7, 2, device)
        given = norm_case(grad.shape, device=device)

        def run(grad, x):
            of_weight = ops.rows_conv_backward(grad, x, rows, *options)
            of_linear = ops.rows_linear_backward(grad[:, :6], x, narrow)
            of_norm = ops.rows_norm_backward(grad, grad * 2, *given)
            return of_weight, ops.rows_bias_backward(grad, rows, 1), of_linear, *of_norm

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(grad, x), run(grad, x), strict=True):
            assert same_bits(a, b)


class TestDerivatives:
    def inputs(self, device):
        grad, x, options = conv_case(
            (2, 4, 6, 5, 4), (3, 2), (2, 1), (1, 1), (1, 2), 2, torch.float64, device
        )
        return grad.requires_grad_(), x.requires_grad_(), options

    def test_conv(self, device):
        grad, x, options = self.inputs(device)
        rows = rows_of(6, 3, device)

        def run(grad, x):
            return ops.rows_conv_backward(grad, x, rows, *options)

        assert torch.autograd.gradcheck(run, (grad, x))
        assert torch.autograd.gradgradcheck(run, (grad, x))

    def test_linear_and_bias(self, device):
        grad = torch.randn(2, 3, 6, dtype=torch.float64, device=device, requires_grad=True)
        x = torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
        rows = rows_of(6, 3, device)
        for run, inputs in [
            (lambda g, x: ops.rows_linear_backward(g, x, rows), (grad, x)),
            (lambda g: ops.rows_bias_backward(g, rows, 2), (grad,)),
            (lambda g: ops.rows_bias_backward(g, rows, -1), (grad,)),
        ]:
            assert torch.autograd.gradcheck(run, inputs)
            assert torch.autograd.gradgradcheck(run, inputs)

    def test_norm(self, device):
        grad, x = (
            torch.randn(3, 5, 2, dtype=torch.float64, device=device, requires_grad=True)
            for _ in range(2)
        )
        given = norm_case(x.shape, torch.float64, device, torch.float64)

        def run(grad, x):
            return ops.rows_norm_backward(grad, x, *given)

        assert torch.autograd.gradcheck(run, (grad, x))
        assert torch.autograd.gradgradcheck(run, (grad, x))
