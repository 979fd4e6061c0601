"""class_order, class_stats_ and class_stats_merge_ against float64 oracles, contracts and laws."""

import pytest
import torch
from helpers import each_capability, layouts, num_threads, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from neusemslice import _C, ops, reference
from neusemslice.ops import STATISTICS, ClassStats

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "sliced", "permuted", "expanded", "requires_grad"]


def labels_for(samples: int, num_classes: int, device: torch.device) -> torch.Tensor:
    """Random labels, every seventh ignored; a class or two may be absent."""
    labels = torch.randint(0, max(num_classes, 1), (samples,), device=device)
    labels[::7] = -100
    return labels if num_classes else torch.full_like(labels, -100)


def observe(x, labels, num_classes, neuron_dim=1, **options) -> ClassStats:
    state = ClassStats.empty(num_classes, x.shape[neuron_dim], device=x.device)
    order = ops.class_order(labels, num_classes)
    ops.class_stats_(state, x, order, neuron_dim=neuron_dim, **options)
    return state


def assert_matches(state: ClassStats, expected: ClassStats, dtype=torch.float32) -> None:
    """Equal up to the rounding that the contract allows for input of that dtype.

    1e-6 is that of planes stored in float32. Input narrower than float64 is added in float32 at
    first: four of its rounding units of the typical |a| in the mean, and of n times its square in
    the sum of squares (rows that a new class sees lie that far from its first, too).
    """
    wanted = expected.tensors()
    assert state.tensors().keys() == wanted.keys()
    exact = dtype == torch.float64
    typical = 0.0
    if not exact and expected.mean_abs is not None and expected.mean_abs.numel():
        typical = float(expected.mean_abs.max())
    heaviest = float(expected.count.max()) if expected.count.numel() else 0.0
    rounding = 4 * 2.0**-24
    absolute = {"mean": rounding * typical, "m2": rounding * heaviest * typical**2}
    for name, tensor in state.tensors().items():
        torch.testing.assert_close(
            tensor.double().cpu(),
            wanted[name].double().cpu(),
            rtol=1e-11 if exact and name in absolute else 1e-6,
            atol=max(1e-9, absolute.get(name, 0.0)),
            msg=lambda m, name=name: f"{name}: {m}",
        )


def assert_same_bits(a: ClassStats, b: ClassStats) -> None:
    for name, tensor in a.tensors().items():
        assert same_bits(tensor, b.tensors()[name]), name


class TestClassOrder:
    @given(st.lists(st.integers(-1, 4), max_size=40))
    def test_equals_the_oracle(self, raw):
        labels = torch.tensor([-100 if y < 0 else y for y in raw], dtype=torch.int64)
        order, offsets, _ = ops.class_order(labels, 5)
        expected_order, expected_offsets = reference.class_order(labels, 5)
        assert torch.equal(order, expected_order)
        assert torch.equal(offsets, expected_offsets)

    def test_reads_strided_labels(self, device):
        labels = torch.randint(0, 3, (20,), device=device)
        got = ops.class_order(labels[::2], 3)
        expected = ops.class_order(labels[::2].contiguous(), 3)
        assert torch.equal(got.order, expected.order)
        assert torch.equal(got.offsets, expected.offsets)

    def test_no_classes_and_no_samples(self, device):
        labels = torch.full((3,), -100, device=device)
        order, offsets, _ = ops.class_order(labels, 0)
        assert order.tolist() == [0, 1, 2]
        assert offsets.tolist() == [0]
        order, offsets, _ = ops.class_order(labels[:0], 2)
        assert order.shape == (0,)
        assert offsets.tolist() == [0, 0, 0]

    @pytest.mark.parametrize("bad", [-1, -99, 4, 2**40])
    def test_label_out_of_range(self, bad):
        with pytest.raises(
            ValueError, match=rf"class_order: labels .*\[0, 4\).*got {bad} at index 1"
        ):
            ops.class_order(torch.tensor([0, bad]), 4)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("bad", [-1, 4, 2**40])
    def test_label_out_of_range_is_ignored_on_cuda(self, bad):
        order, offsets, _ = ops.class_order(torch.tensor([bad, 2], device="cuda"), 4)
        assert order.tolist() == [1, 0]
        assert offsets.tolist() == [0, 0, 0, 1, 1]

    def test_refuses_wrong_dtype_and_shape(self, device):
        with pytest.raises(TypeError, match=r"labels must be int64, got int32 \[4, 3\]"):
            ops.class_order(torch.zeros(4, 3, dtype=torch.int32, device=device), 4)
        with pytest.raises(ValueError, match=r"labels must be int64 \[N\], got int64 \[4, 3\]"):
            ops.class_order(torch.zeros(4, 3, dtype=torch.int64, device=device), 4)
        with pytest.raises(ValueError, match="num_classes must not be negative, got -1"):
            ops.class_order(torch.zeros(4, dtype=torch.int64, device=device), -1)

    def test_opcheck(self, device):
        for labels in (
            torch.tensor([1, -100, 0, 1], device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.randint(0, 2, (8,), device=device)[::2],
        ):
            opcheck(torch.ops.neusemslice.class_order.default, (labels, 2))


class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(40, 67), (23, 5, 3, 4), (9, 130, 7)], ids=str)
    def test_equals_the_oracle(self, shape, layout, dtype, device):
        x = layouts(shape, dtype, device)[layout]
        labels = labels_for(shape[0], 4, device)
        state = observe(x, labels, 4)
        expected = reference.class_stats(x.detach().cpu(), labels.cpu(), 4)
        assert_matches(state, expected, dtype)

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("samples", [3, 60])
    def test_more_neurons_than_are_handled_at_once(self, samples, threads, device):
        x = torch.randn(samples, 2085, device=device)
        labels = torch.arange(samples, device=device) % 2
        used = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            state = observe(x, labels, 3)
        finally:
            torch.set_num_threads(used)
        assert_matches(state, reference.class_stats(x.cpu(), labels.cpu(), 3))

    def test_channels_last(self, device):
        x = torch.randn(12, 70, 3, 5, device=device).to(memory_format=torch.channels_last)
        labels = labels_for(12, 3, device)
        assert_matches(observe(x, labels, 3), reference.class_stats(x.cpu(), labels.cpu(), 3))

    def test_positions_without_a_common_stride(self, device):
        x = torch.randn(6, 5, 4, 3, device=device)[:, :, :, ::2].transpose(2, 3)[:, :, :, ::3]
        labels = labels_for(6, 2, device)
        assert_matches(observe(x, labels, 2), reference.class_stats(x.cpu(), labels.cpu(), 2))

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("neuron_dim", [1, 2, -2, 3])
    def test_neurons_between_positions(self, neuron_dim, masked, device):
        x = torch.randn(6, 5, 4, 3, device=device)
        labels = labels_for(6, 2, device)
        shape = list(x.shape)
        del shape[neuron_dim]
        mask = torch.rand(shape, device=device) > 0.3 if masked else None
        state = observe(x, labels, 2, neuron_dim=neuron_dim, mask=mask)
        expected = reference.class_stats(
            x.cpu(),
            labels.cpu(),
            2,
            mask=None if mask is None else mask.cpu(),
            neuron_dim=neuron_dim,
        )
        assert_matches(state, expected)

    @pytest.mark.parametrize("neuron_dim", [2, -1])
    def test_tokens_with_mask_and_weights(self, neuron_dim, device):
        x = torch.randn(10, 6, 33, device=device)
        mask = torch.rand(10, 6, device=device) > 0.4
        mask[2] = False
        weight = torch.rand(10, device=device)
        weight[1] = 0
        labels = labels_for(10, 3, device)
        options = {"mask": mask, "weight": weight}
        state = observe(x, labels, 3, neuron_dim=neuron_dim, **options)
        expected = reference.class_stats(
            x.cpu(), labels.cpu(), 3, weight.cpu(), mask.cpu(), neuron_dim=-1
        )
        assert_matches(state, expected)

    def test_padding_does_not_change_the_result(self, device):
        x = torch.randn(5, 4, 9, device=device)
        labels = torch.tensor([0, 1, 0, 1, 1], device=device)
        real = torch.ones(5, 4, dtype=torch.bool, device=device)
        plain = observe(x, labels, 2, neuron_dim=-1, mask=real)
        garbage = torch.full((5, 3, 9), torch.nan, device=device)
        for parts, masks in (
            ((x, garbage), (real, torch.zeros_like(real[:, :3]))),
            ((garbage, x), (torch.zeros_like(real[:, :3]), real)),
        ):
            padded = observe(
                torch.cat(parts, 1), labels, 2, neuron_dim=-1, mask=torch.cat(masks, 1)
            )
            assert_same_bits(plain, padded)

    @given(
        st.integers(0, 9),
        st.integers(0, 9),
        st.integers(0, 4),
        st.integers(0, 4),
        st.integers(1, 4),
    )
    def test_any_shape_in_any_split(self, samples, neurons, positions, num_classes, step):
        x = torch.randn(samples, neurons, positions, dtype=torch.float64)
        labels = labels_for(samples, num_classes, torch.device("cpu"))
        state = ClassStats.empty(num_classes, neurons)
        for begin in range(0, samples, step):
            order = ops.class_order(labels[begin : begin + step], num_classes)
            ops.class_stats_(state, x[begin : begin + step], order)
        assert_matches(state, reference.class_stats(x, labels, num_classes))

    def test_mean_far_from_zero(self, device):
        x = torch.randn(4000, 8, device=device) + 10_000
        labels = torch.randint(0, 2, (4000,), device=device)
        state = ClassStats.empty(2, 8, device=device)
        for part, y in zip(x.split(256), labels.split(256), strict=True):
            ops.class_stats_(state, part, ops.class_order(y, 2))
        expected = torch.stack([x[labels == k].double().var(0, correction=0) for k in range(2)])
        # The CPU squares deviations in float32, whose rounding is 6e-8 of each.
        torch.testing.assert_close(state.variance(), expected, rtol=1e-6, atol=0)

    def test_absent_and_single_sample_class(self, device):
        x = torch.randn(1, 3, device=device)
        state = observe(x, torch.tensor([1], device=device), 3)
        assert state.count.tolist() == [0, 1, 0]
        assert torch.equal(state.mean[1].float(), x[0])
        assert (state.variance() == 0).all()
        assert (state.max[[0, 2]] == -torch.inf).all()

    @pytest.mark.parametrize(
        "statistics", [(), ("mean",), ("mean", "m2"), ("max",), ("mean_abs", "active")]
    )
    def test_selected_statistics_equal_those_of_the_whole(self, statistics, device):
        x, labels = torch.randn(30, 7, device=device), labels_for(30, 3, device)
        order = ops.class_order(labels, 3)
        whole = observe(x, labels, 3)
        state = ClassStats.empty(3, 7, statistics, device=device)
        ops.class_stats_(state, x, order)
        assert set(state.tensors()) == {"count", "positions", "nonfinite", *statistics}
        for name, tensor in state.tensors().items():
            assert same_bits(tensor, whole.tensors()[name]), name


class TestNonfinite:
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_counted_and_not_absorbed(self, bad, device):
        x = torch.rand(6, 3, 4, device=device)
        labels = torch.tensor([0, 1, 0, 1, 0, -100], device=device)
        clean = x.clone()
        clean[0, 1, 2] = 0
        clean[3, 2, 0] = 0
        x[0, 1, 2] = bad
        x[3, 2, 0] = bad
        x[5, 0, 0] = bad  # belongs to no class
        state, expected = observe(x, labels, 2), observe(clean, labels, 2)
        assert state.nonfinite.tolist() == [0, 1, 1]
        expected.nonfinite.copy_(state.nonfinite)
        assert_same_bits(state, expected)


class TestSoftLabels:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", ["rows", "weights", "tokens", "planes"])
    def test_equals_the_oracle(self, case, dtype, device):
        labels = torch.rand(20, 4, device=device)
        labels[labels < 0.3] = 0
        labels[3] = 0
        x = torch.randn(20, 19, 5, device=device).to(dtype)
        options: dict = {}
        if case == "rows":
            x = x[..., 0]
        elif case == "weights":
            options["weight"] = torch.rand(20, device=device)
            options["weight"][5] = 0
        elif case == "tokens":
            options = {"neuron_dim": -1, "mask": torch.rand(20, 19, device=device) > 0.4}
        state = observe(x, labels, 4, **options)
        on_cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        assert_matches(state, reference.class_stats(x.cpu(), labels.cpu(), 4, **on_cpu), dtype)

    def test_one_hot_equals_hard_labels(self, device):
        x = torch.randn(30, 20, device=device)
        hard = torch.randint(0, 3, (30,), device=device)
        soft = torch.nn.functional.one_hot(hard, 3).double()
        assert_matches(observe(x, soft, 3), observe(x, hard, 3))

    def test_a_value_that_is_not_finite_counts_once_per_class_of_its_sample(self, device):
        x = torch.tensor([[torch.nan, 1.0], [2.0, 3.0]], device=device)
        state = observe(x, torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], device=device), 3)
        assert state.nonfinite.tolist() == [2, 0]
        assert state.count.tolist() == [1.5, 0.5, 0.0]

    def test_refuses_another_number_of_classes(self, device):
        with pytest.raises(ValueError, match=r"soft labels must be \[N, 3\], got \[5, 4\]"):
            ops.class_order(torch.rand(5, 4, device=device), 3)

    @pytest.mark.parametrize("bad", [-0.5, torch.nan, torch.inf])
    def test_refuses_bad_shares_on_the_cpu(self, bad):
        order = ops.class_order(torch.tensor([[1.0, 0.0], [bad, 1.0]]), 2)
        state = ClassStats.empty(2, 3)
        with pytest.raises(ValueError, match=r"share must be finite and not negative.*at index 1"):
            ops.class_stats_(state, torch.ones(2, 3), order)
        assert state.count.sum() == 0


class TestDeterminism:
    @pytest.mark.parametrize("shape", [(64, 300), (16, 150, 5, 5)], ids=str)
    def test_same_bits_twice_and_at_any_thread_count(self, shape):
        x, labels = torch.randn(shape), torch.randint(0, 5, (shape[0],))
        with num_threads(1):
            one = observe(x, labels, 5)
            again = observe(x, labels, 5)
        with num_threads(2):
            two = observe(x, labels, 5)
        assert_same_bits(one, again)
        assert_same_bits(one, two)

    def test_same_bits_twice_on_the_device(self, device):
        x, labels = torch.randn(64, 130, device=device), torch.randint(0, 5, (64,), device=device)
        assert_same_bits(observe(x, labels, 5), observe(x, labels, 5))


class TestCapabilities:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "case",
        ["rows", "odd", "one", "weights", "planes", "channels_last", "tokens", "mean", "max"],
    )
    def test_same_bits_on_every_instruction_set(self, case, dtype):
        labels = torch.randint(0, 3, (40,))
        options: dict = {}
        statistics = STATISTICS
        x = (torch.randn(40, 64) * 3 + 1).to(dtype)
        if case == "odd":
            x = x[:, :37].contiguous()
        elif case == "one":
            x = x[:, :1].contiguous()
        elif case == "weights":
            options["weight"] = torch.rand(40)
        elif case in ("planes", "channels_last"):
            x = torch.randn(40, 33, 7, 5).to(dtype)
            if case == "channels_last":
                x = x.to(memory_format=torch.channels_last)
        elif case == "tokens":
            x = torch.randn(40, 9, 33).to(dtype)
            options = {"neuron_dim": -1, "mask": torch.rand(40, 9) > 0.3}
        elif case in ("mean", "max"):
            statistics = (case,)
        if x.is_contiguous():
            x.view(-1)[7] = torch.nan
        states = []
        for name in each_capability():
            assert _C.build_info()["cpu_capability"] == name
            state = ClassStats.empty(3, x.shape[options.get("neuron_dim", 1)], statistics)
            for _ in range(2):
                ops.class_stats_(state, x, ops.class_order(labels, 3), **options)
            states.append(state)
        for other in states[1:]:
            assert_same_bits(states[0], other)

    def test_refuses_what_the_processor_lacks(self):
        with pytest.raises(ValueError, match="this processor has no 'neon'"):
            _C.set_cpu_capability("neon")


class TestRange:
    @pytest.mark.parametrize("scale", [1e-25, 1e-15, 1.0, 1e15, 1e25, 1e37])
    @pytest.mark.parametrize("shape", [(50, 20), (50, 20, 3)], ids=str)
    def test_squares_beyond_float32(self, shape, scale):
        x = torch.randn(shape) * scale
        labels = torch.randint(0, 2, (50,))
        state, expected = observe(x, labels, 2), reference.class_stats(x, labels, 2)
        assert state.m2 is not None
        assert expected.m2 is not None
        torch.testing.assert_close(state.m2, expected.m2, rtol=1e-6, atol=0)

    def test_infinite_values_throughout(self):
        x = torch.full((9, 20), torch.inf)
        state = observe(x, torch.zeros(9, dtype=torch.int64), 1)
        assert state.nonfinite.tolist() == [9] * 20
        assert (state.mean == 0).all()
        assert (state.m2 == 0).all()
        assert (state.max == -torch.inf).all()


class TestMerge:
    def parts(self, device, count=3):
        x = torch.randn(60, 9, dtype=torch.float64, device=device) + 3
        labels = labels_for(60, 4, device)
        step = 60 // count
        states = [observe(x[i : i + step], labels[i : i + step], 4) for i in range(0, 60, step)]
        return states, reference.class_stats(x.cpu(), labels.cpu(), 4)

    def test_equals_one_pass(self, device):
        states, expected = self.parts(device)
        for other in states[1:]:
            ops.class_stats_merge_(states[0], other)
        assert_matches(states[0], expected)

    def test_associative_up_to_rounding(self, device):
        (a, b, c), _ = self.parts(device)
        left = ClassStats.empty(4, 9, device=device)
        for part in (a, b, c):
            ops.class_stats_merge_(left, part)
        right = ClassStats.empty(4, 9, device=device)
        tail = ClassStats.empty(4, 9, device=device)
        for part in (b, c):
            ops.class_stats_merge_(tail, part)
        ops.class_stats_merge_(right, a)
        ops.class_stats_merge_(right, tail)
        assert_matches(left, right)

    def test_empty_side_is_neutral(self, device):
        (a, *_), _ = self.parts(device)
        before = ClassStats(**{name: t.clone() for name, t in a.tensors().items()})
        ops.class_stats_merge_(a, ClassStats.empty(4, 9, device=device))
        assert_same_bits(a, before)
        empty = ClassStats.empty(4, 9, device=device)
        ops.class_stats_merge_(empty, before)
        assert_same_bits(empty, before)

    def test_refuses_other_sizes_and_statistics(self, device):
        state = ClassStats.empty(4, 9, device=device)
        with pytest.raises(ValueError, match="4 classes and 9 neurons, got 3 and 9"):
            ops.class_stats_merge_(state, ClassStats.empty(3, 9, device=device))
        with pytest.raises(ValueError, match="same statistics"):
            ops.class_stats_merge_(state, ClassStats.empty(4, 9, ("mean",), device=device))


class TestContract:
    def test_backward_through_a_changed_state_raises(self, device):
        state = ClassStats.empty(2, 3, device=device)
        factor = torch.ones(2, 3, dtype=torch.float64, device=device, requires_grad=True)
        loss = (state.mean * factor).sum()
        ops.class_stats_(
            state,
            torch.randn(4, 3, device=device),
            ops.class_order(torch.tensor([0, 1, 1, 0], device=device), 2),
        )
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"x": torch.zeros(4, 3, dtype=torch.int64)},
                TypeError,
                "x must be float64.*got int64",
            ),
            ({"x": torch.zeros(4, 5)}, ValueError, r"x must have 3 neurons.*got float32 \[4, 5\]"),
            ({"x": torch.zeros(4)}, ValueError, "x must have a sample and a neuron dimension"),
            ({"x": torch.zeros(5, 3)}, ValueError, r"order must have shape \[5\]"),
            ({"neuron_dim": 0}, ValueError, "neuron_dim must name a dimension.*got 0"),
            ({"neuron_dim": 2}, ValueError, "neuron_dim must name a dimension.*got 2"),
            ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \[4\].*\[3\]"),
            ({"weight": torch.ones(4, dtype=torch.int64)}, TypeError, "weight must be floating"),
            ({"mask": torch.ones(4, 1)}, TypeError, "mask must be bool, got float32"),
            (
                {"mask": torch.ones(4, 1, dtype=torch.bool)},
                ValueError,
                r"mask must have shape \[4\]",
            ),
            ({"count": torch.zeros(2)}, TypeError, "count must be float64, got float32"),
            (
                {"mean": torch.zeros(3, 2, dtype=torch.float64)},
                ValueError,
                r"mean must have shape \[2, 3\]",
            ),
            ({"offsets": torch.tensor([0, 4])}, ValueError, r"offsets must have shape \[3\]"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_refuses_and_changes_nothing(self, change, error, message, device):
        state = ClassStats.empty(2, 3, device=device)
        change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
        for name in ("count", "mean"):
            if name in change:
                setattr(state, name, change.pop(name))
        before = {name: t.clone() for name, t in state.tensors().items()}
        order = ops.class_order(torch.tensor([0, 1, 1, 0], device=device), 2)
        if "offsets" in change:
            order = order._replace(offsets=change.pop("offsets"))
        x = change.pop("x", torch.randn(4, 3, device=device))
        with pytest.raises(error, match=f"class_stats_: {message}"):
            ops.class_stats_(state, x, order, **change)
        for name, tensor in state.tensors().items():
            assert same_bits(tensor, before[name]), name

    @pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
    def test_refuses_bad_weights_on_the_cpu(self, bad):
        state = ClassStats.empty(1, 3)
        order = ops.class_order(torch.zeros(2, dtype=torch.int64), 1)
        with pytest.raises(ValueError, match=r"weight must be finite and not negative.*at index 1"):
            ops.class_stats_(state, torch.ones(2, 3), order, weight=torch.tensor([1.0, bad]))
        assert state.count.item() == 0

    @pytest.mark.parametrize(
        ("order", "offsets", "message"),
        [
            ([0, 9], [0, 2], r"order must lie in \[0, 2\), got 9 at index 1"),
            ([0, 1], [0, 3], "offsets must rise"),
            ([0, 1], [1, 2], "offsets must rise"),
        ],
    )
    def test_refuses_an_order_that_reads_outside(self, order, offsets, message):
        bad = ops.ClassOrder(torch.tensor(order), torch.tensor(offsets))
        with pytest.raises(ValueError, match=message):
            ops.class_stats_(ClassStats.empty(1, 3), torch.ones(2, 3), bad)

    def test_refuses_mixed_devices(self):
        order = ops.class_order(torch.zeros(2, dtype=torch.int64), 1)
        with pytest.raises(
            ValueError, match=r"class_stats_: all tensors must be on one device.*cpu and meta"
        ):
            ops.class_stats_(ClassStats.empty(1, 3), torch.ones(2, 3, device="meta"), order)

    def test_empty_state_names_what_it_does_not_know(self):
        with pytest.raises(ValueError, match="'median'"):
            ClassStats.empty(2, 3, ("median",))
        with pytest.raises(ValueError, match="'m2' must also hold 'mean'"):
            ClassStats.empty(2, 3, ("m2",))
        with pytest.raises(ValueError, match="got -1 and 3"):
            ClassStats.empty(-1, 3)
        with pytest.raises(ValueError, match="needs the statistic 'm2'"):
            ClassStats.empty(2, 3, ("mean",)).variance()


class TestTorch:
    @pytest.mark.parametrize("layout", [*LAYOUTS, "empty"])
    def test_opcheck(self, layout, device):
        x = (
            torch.zeros(0, 3, device=device)
            if layout == "empty"
            else layouts((7, 3), torch.float32, device)[layout]
        )
        state = ClassStats.empty(2, 3, device=device)
        order = ops.class_order(torch.randint(0, 2, (x.shape[0],), device=device), 2)
        planes = tuple(state.tensors().values())
        opcheck(torch.ops.neusemslice.class_stats_.default, (*planes, x, *order))
        absent = (*planes[:3], None, None, None, planes[6], None)
        opcheck(torch.ops.neusemslice.class_stats_.default, (*absent, x, *order))
        soft = ops.class_order(torch.rand(x.shape[0], 2, device=device), 2)
        opcheck(torch.ops.neusemslice.class_stats_.default, (*planes, x, *soft))
        other = tuple(ClassStats.empty(2, 3, device=device).tensors().values())
        opcheck(torch.ops.neusemslice.class_stats_merge_.default, (*planes, *other))

    @pytest.mark.parametrize(
        "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
    )
    def test_compiles_without_a_graph_break(self, backend, device):
        def step(state: ClassStats, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            y = (x * 2).relu()
            ops.class_stats_(state, y, ops.class_order(labels, 3))
            return y

        x, labels = torch.randn(20, 6, device=device), torch.randint(0, 3, (20,), device=device)
        eager, compiled = (ClassStats.empty(3, 6, device=device) for _ in range(2))
        step(eager, x, labels)
        torch.compile(step, fullgraph=True, backend=backend)(compiled, x, labels)
        assert_same_bits(eager, compiled)
        torch.compiler.reset()

    def test_autocast_and_deterministic_mode(self, device):
        x, labels = torch.randn(20, 6, device=device), torch.randint(0, 3, (20,), device=device)
        plain = observe(x, labels, 3)
        torch.use_deterministic_algorithms(True)
        try:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                assert_same_bits(plain, observe(x, labels, 3))
        finally:
            torch.use_deterministic_algorithms(False)
