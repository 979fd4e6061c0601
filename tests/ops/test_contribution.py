"""contribution_ against a float64 oracle, its contract, and laws."""

import pytest
import torch
from helpers import each_capability, layouts, num_threads, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from neusemslice import ops, reference
from neusemslice.ops import CONTRIBUTION_STATISTICS, ClassStats

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "sliced", "permuted", "expanded", "requires_grad"]


def labels_for(samples: int, num_classes: int, device: torch.device) -> torch.Tensor:
    """Random labels, every seventh ignored; a class or two may be absent."""
    labels = torch.randint(0, max(num_classes, 1), (samples,), device=device)
    labels[::7] = -100
    return labels if num_classes else torch.full_like(labels, -100)


def contribute(x, g, labels, num_classes, neuron_dim=1, **options) -> ClassStats:
    state = ClassStats.empty(
        num_classes, x.shape[neuron_dim], CONTRIBUTION_STATISTICS, device=x.device
    )
    order = ops.class_order(labels, num_classes)
    ops.contribution_(state, x, g, order, neuron_dim=neuron_dim, **options)
    return state


def oracle(x, g, labels, num_classes, **options) -> ClassStats:
    options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return reference.contribution(
        x.detach().cpu(), g.detach().cpu(), labels.cpu(), num_classes, **options
    )


def assert_matches(state: ClassStats, expected: ClassStats) -> None:
    """Equal up to float64's rounding of sums of some thousand terms, whatever the input's dtype.

    Signed terms may cancel, so the mean is held to the size of what was added. `mean_abs` is stored
    in float32, with one rounding of 6e-8 per batch.
    """
    assert state.mean is not None
    assert state.mean_abs is not None
    assert expected.mean is not None
    assert expected.mean_abs is not None
    for name in ("count", "positions"):
        torch.testing.assert_close(
            getattr(state, name).cpu(), getattr(expected, name), rtol=1e-13, atol=0
        )
    assert torch.equal(state.nonfinite.cpu(), expected.nonfinite)
    error = (state.mean.cpu() - expected.mean).abs()
    typical = float(expected.mean_abs.max()) if expected.mean_abs.numel() else 0.0
    assert (error <= 1e-12 * typical).all(), error.max()
    torch.testing.assert_close(state.mean_abs.double().cpu(), expected.mean_abs, rtol=1e-6, atol=0)


def assert_same_bits(a: ClassStats, b: ClassStats) -> None:
    for name, tensor in a.tensors().items():
        assert same_bits(tensor, b.tensors()[name]), name


class TestValues:
    @pytest.mark.parametrize("g_layout", ["contiguous", "sliced", "permuted", "expanded"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(40, 67), (23, 5, 3, 7), (9, 130, 17)], ids=str)
    def test_equals_the_oracle(self, shape, layout, g_layout, device):
        x = layouts(shape, torch.float32, device)[layout]
        g = layouts(shape, torch.float32, device)[g_layout]
        labels = labels_for(shape[0], 4, device)
        assert_matches(contribute(x, g, labels, 4), oracle(x, g, labels, 4))

    @pytest.mark.parametrize("g_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(40, 67), (9, 35, 3, 7)], ids=str)
    def test_dtypes_may_differ(self, shape, dtype, g_dtype, device):
        x, g = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device)
        g = (g * 1e-3).to(g_dtype)
        labels = labels_for(shape[0], 4, device)
        assert_matches(contribute(x, g, labels, 4), oracle(x, g, labels, 4))

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("samples", [3, 60])
    def test_more_neurons_than_are_handled_at_once(self, samples, threads, device):
        x, g = torch.randn(2, samples, 2085, device=device)
        labels = torch.arange(samples, device=device) % 2
        with num_threads(threads):
            state = contribute(x, g, labels, 3)
        assert_matches(state, oracle(x, g, labels, 3))

    @pytest.mark.parametrize("which", ["both", "x", "g"])
    def test_channels_last(self, which, device):
        x, g = torch.randn(2, 12, 70, 3, 5, device=device)
        if which != "g":
            x = x.to(memory_format=torch.channels_last)
        if which != "x":
            g = g.to(memory_format=torch.channels_last)
        labels = labels_for(12, 3, device)
        assert_matches(contribute(x, g, labels, 3), oracle(x, g, labels, 3))

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("neuron_dim", [1, 2, -2, 3])
    def test_neurons_between_positions(self, neuron_dim, masked, device):
        x, g = torch.randn(2, 6, 5, 4, 3, device=device)
        labels = labels_for(6, 2, device)
        shape = list(x.shape)
        del shape[neuron_dim]
        mask = torch.rand(shape, device=device) > 0.3 if masked else None
        options = {"neuron_dim": neuron_dim, "mask": mask}
        assert_matches(contribute(x, g, labels, 2, **options), oracle(x, g, labels, 2, **options))

    @pytest.mark.parametrize("g_layout", ["contiguous", "permuted"])
    @pytest.mark.parametrize("neuron_dim", [1, 2, -1])
    def test_tokens_with_mask_and_weights(self, neuron_dim, g_layout, device):
        x = torch.randn(10, 36, 33, device=device)
        g = layouts((10, 36, 33), torch.float32, device)[g_layout]
        mask = torch.rand(10, 33 if neuron_dim == 1 else 36, device=device) > 0.4
        mask[2] = False
        weight = torch.rand(10, device=device)
        weight[1] = 0
        labels = labels_for(10, 3, device)
        options = {"mask": mask, "weight": weight, "neuron_dim": neuron_dim}
        assert_matches(contribute(x, g, labels, 3, **options), oracle(x, g, labels, 3, **options))

    @pytest.mark.parametrize("case", ["rows", "weights", "tokens", "planes"])
    def test_soft_labels(self, case, device):
        labels = torch.rand(20, 4, device=device)
        labels[labels < 0.3] = 0
        labels[3] = 0
        x, g = torch.randn(2, 20, 19, 18, device=device)
        options: dict = {}
        if case == "rows":
            x, g = x[..., 0], g[..., 0]
        elif case == "weights":
            options["weight"] = torch.rand(20, device=device)
            options["weight"][5] = 0
        elif case == "tokens":
            options = {"neuron_dim": -1, "mask": torch.rand(20, 19, device=device) > 0.4}
        assert_matches(contribute(x, g, labels, 4, **options), oracle(x, g, labels, 4, **options))

    def test_the_mean_over_positions_comes_before_the_absolute_value(self, device):
        x = torch.ones(1, 1, 2, device=device)
        g = torch.tensor([[[3.0, -1.0]]], device=device)
        state = contribute(x, g, torch.tensor([0], device=device), 1)
        assert state.mean.item() == state.mean_abs.item() == 1
        assert state.positions.item() == state.count.item() == 1

    def test_padding_does_not_change_the_result(self, device):
        x, g = torch.randn(2, 5, 4, 9, device=device)
        labels = torch.tensor([0, 1, 0, 1, 1], device=device)
        real = torch.ones(5, 4, dtype=torch.bool, device=device)
        plain = contribute(x, g, labels, 2, neuron_dim=-1, mask=real)
        garbage = torch.full((5, 3, 9), torch.nan, device=device)
        padded = contribute(
            torch.cat((garbage, x), 1),
            torch.cat((garbage, g), 1),
            labels,
            2,
            neuron_dim=-1,
            mask=torch.cat((torch.zeros_like(real[:, :3]), real), 1),
        )
        assert_same_bits(plain, padded)

    def test_a_product_beyond_float32(self, device):
        x = torch.full((2, 3), 1e30, device=device)
        state = contribute(x, -x, torch.tensor([0, 0], device=device), 1)
        assert state.nonfinite.sum() == 0
        assert torch.equal(state.mean[0], -(x[0].double() ** 2))

    @given(
        st.integers(0, 9),
        st.integers(0, 18),
        st.integers(0, 4),
        st.integers(0, 4),
        st.integers(1, 4),
    )
    def test_any_shape_in_any_split(self, samples, neurons, positions, num_classes, step):
        x, g = torch.randn(2, samples, neurons, positions, dtype=torch.float64)
        labels = labels_for(samples, num_classes, torch.device("cpu"))
        state = ClassStats.empty(num_classes, neurons, CONTRIBUTION_STATISTICS)
        for begin in range(0, samples, step):
            part = slice(begin, begin + step)
            ops.contribution_(state, x[part], g[part], ops.class_order(labels[part], num_classes))
        assert_matches(state, reference.contribution(x, g, labels, num_classes))

    @given(st.integers(0, 2**16), st.floats(-4, 4).filter(lambda f: f != 0))
    def test_scaling_the_gradient_scales_the_contribution(self, seed, factor):
        generator = torch.Generator().manual_seed(seed)
        x, g = torch.randn(2, 7, 5, 3, dtype=torch.float64, generator=generator)
        labels = torch.randint(0, 2, (7,), generator=generator)
        one, scaled = contribute(x, g, labels, 2), contribute(x, g * factor, labels, 2)
        assert one.mean is not None
        assert one.mean_abs is not None
        torch.testing.assert_close(scaled.mean, one.mean * factor, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(scaled.mean_abs, one.mean_abs * abs(factor))

    def test_parts_merge_into_the_whole(self, device):
        x, g = torch.randn(2, 60, 9, 4, device=device)
        labels = labels_for(60, 4, device)
        state = contribute(x[:25], g[:25], labels[:25], 4)
        ops.class_stats_merge_(state, contribute(x[25:], g[25:], labels[25:], 4))
        assert_matches(state, oracle(x, g, labels, 4))

    @pytest.mark.parametrize("statistics", [(), ("mean",), ("mean_abs",)])
    def test_selected_statistics_equal_those_of_the_whole(self, statistics, device):
        x, g = torch.randn(2, 30, 7, device=device)
        labels = labels_for(30, 3, device)
        whole = contribute(x, g, labels, 3)
        state = ClassStats.empty(3, 7, statistics, device=device)
        ops.contribution_(state, x, g, ops.class_order(labels, 3))
        assert set(state.tensors()) == {"count", "positions", "nonfinite", *statistics}
        for name, tensor in state.tensors().items():
            assert same_bits(tensor, whole.tensors()[name]), name


class TestNonfinite:
    @pytest.mark.parametrize("form", ["rows", "planes", "channels_last", "mixed"])
    @pytest.mark.parametrize(
        ("a", "b"), [(torch.nan, 1.0), (torch.inf, 1.0), (0.0, -torch.inf), (1e200, 1e200)]
    )
    def test_counted_and_not_absorbed(self, a, b, form, device):
        shape = (6, 20) if form == "rows" else (6, 20, 5, 4)
        x, g = torch.randn(2, *shape, dtype=torch.float64, device=device)
        if form == "channels_last":
            x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
        elif form == "mixed":
            g = g.to(memory_format=torch.channels_last)
        labels = torch.tensor([0, 1, 0, 1, 0, -100], device=device)
        clean_x, clean_g = x.clone(), g.clone()
        for n, c in ((0, 1), (3, 18), (5, 0)):  # the last belongs to no class
            clean_x[n, c].view(-1)[0] = 0
            x[n, c].view(-1)[0] = a
            g[n, c].view(-1)[0] = b
        state, expected = contribute(x, g, labels, 2), contribute(clean_x, clean_g, labels, 2)
        assert state.nonfinite.tolist() == [0, 1] + [0] * 16 + [1, 0]
        expected.nonfinite.copy_(state.nonfinite)
        assert_same_bits(state, expected)

    def test_counts_once_per_class_of_its_sample(self, device):
        x = torch.tensor([[torch.nan, 1.0], [2.0, 3.0]], device=device)
        labels = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], device=device)
        state = contribute(x, torch.ones_like(x), labels, 3)
        assert state.nonfinite.tolist() == [2, 0]
        assert state.count.tolist() == [1.5, 0.5, 0.0]

    def test_nothing_finite_at_all(self, device):
        x = torch.full((9, 20, 3), torch.inf, device=device)
        state = contribute(x, x, torch.zeros(9, dtype=torch.int64, device=device), 1)
        assert state.nonfinite.tolist() == [27] * 20
        assert (state.mean == 0).all()
        assert (state.mean_abs == 0).all()


class TestDeterminism:
    @pytest.mark.parametrize(
        "shape", [(64, 300), (64, 7), (16, 150, 5, 5), (32, 16, 8, 8), (9, 33, 3)], ids=str
    )
    def test_same_bits_twice_and_at_any_thread_count(self, shape):
        x, g = torch.randn(2, *shape)
        x.view(-1)[5] = torch.nan
        labels = torch.randint(0, 5, (shape[0],))
        states = []
        for threads in (1, 1, 2, 3):
            with num_threads(threads):
                states.append(contribute(x, g, labels, 5))
        for other in states[1:]:
            assert_same_bits(states[0], other)

    def test_same_bits_twice_on_the_device(self, device):
        x, g = torch.randn(2, 64, 130, device=device)
        labels = torch.randint(0, 5, (64,), device=device)
        assert_same_bits(contribute(x, g, labels, 5), contribute(x, g, labels, 5))

    @pytest.mark.parametrize("g_dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "case", ["rows", "odd", "weights", "planes", "channels_last", "tokens"]
    )
    def test_same_bits_on_every_instruction_set(self, case, dtype, g_dtype):
        labels = torch.randint(0, 3, (40,))
        options: dict = {}
        shape = {"odd": (40, 37), "tokens": (40, 9, 33)}.get(case, (40, 64))
        if case in ("planes", "channels_last"):
            shape = (40, 33, 7, 5)
        x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(g_dtype)
        x.view(-1)[7] = torch.nan
        if case == "weights":
            options["weight"] = torch.rand(40)
        elif case == "channels_last":
            x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
        elif case == "tokens":
            options = {"neuron_dim": -1, "mask": torch.rand(40, 9) > 0.3}
        states = []
        for _ in each_capability():
            state = ClassStats.empty(
                3, x.shape[options.get("neuron_dim", 1)], CONTRIBUTION_STATISTICS
            )
            for _ in range(2):
                ops.contribution_(state, x, g, ops.class_order(labels, 3), **options)
            states.append(state)
        for other in states[1:]:
            assert_same_bits(states[0], other)


class TestContract:
    def test_backward_through_a_changed_state_raises(self, device):
        state = ClassStats.empty(2, 3, CONTRIBUTION_STATISTICS, device=device)
        factor = torch.ones(2, 3, dtype=torch.float64, device=device, requires_grad=True)
        loss = (state.mean * factor).sum()
        x = torch.randn(4, 3, device=device)
        ops.contribution_(
            state, x, x, ops.class_order(torch.tensor([0, 1, 1, 0], device=device), 2)
        )
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "x must be float64.*int64"),
            ({"g": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "g must be float64.*int64"),
            ({"g": torch.zeros(4, 1)}, ValueError, r"g must have shape \[4, 3\], got float32 \[4,"),
            (
                {"x": torch.zeros(4, 5), "g": torch.zeros(4, 5)},
                ValueError,
                r"x must have 3 neurons.*got float32 \[4, 5\]",
            ),
            ({"neuron_dim": 0}, ValueError, "neuron_dim must name a dimension.*got 0"),
            ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \[4\].*\[3\]"),
            ({"mask": torch.ones(4, 1)}, TypeError, "mask must be bool, got float32"),
            ({"count": torch.zeros(2)}, TypeError, "count must be float64, got float32"),
            (
                {"max": torch.zeros(2, 3), "active": torch.zeros(2, 3)},
                ValueError,
                r"the state must hold no statistic but \('mean', 'mean_abs'\), "
                r"got \['max', 'active'\]",
            ),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_refuses_and_changes_nothing(self, change, error, message, device):
        state = ClassStats.empty(2, 3, CONTRIBUTION_STATISTICS, device=device)
        change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
        for name in ("count", "max", "active"):
            if name in change:
                setattr(state, name, change.pop(name))
        before = {name: t.clone() for name, t in state.tensors().items()}
        order = ops.class_order(torch.tensor([0, 1, 1, 0], device=device), 2)
        x, g = (change.pop(name, torch.randn(4, 3, device=device)) for name in ("x", "g"))
        with pytest.raises(error, match=f"contribution_: {message}"):
            ops.contribution_(state, x, g, order, **change)
        for name, tensor in state.tensors().items():
            assert same_bits(tensor, before[name]), name

    @pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
    def test_refuses_bad_weights_on_the_cpu(self, bad):
        x = torch.ones(2, 3)
        with pytest.raises(ValueError, match=r"contribution_: weight must be finite.*at index 1"):
            contribute(x, x, torch.zeros(2, dtype=torch.int64), 1, weight=torch.tensor([1.0, bad]))

    def test_refuses_an_order_that_reads_outside(self):
        bad = ops.ClassOrder(torch.tensor([0, 9]), torch.tensor([0, 2]))
        x = torch.ones(2, 3)
        with pytest.raises(ValueError, match=r"contribution_: order must lie in \[0, 2\), got 9"):
            ops.contribution_(ClassStats.empty(1, 3, CONTRIBUTION_STATISTICS), x, x, bad)

    def test_refuses_mixed_devices(self):
        x = torch.ones(2, 3)
        with pytest.raises(ValueError, match=r"contribution_: all tensors must be on one device"):
            ops.contribution_(
                ClassStats.empty(1, 3, CONTRIBUTION_STATISTICS),
                x,
                x.to("meta"),
                ops.class_order(torch.zeros(2, dtype=torch.int64), 1),
            )


class TestTorch:
    @pytest.mark.parametrize("layout", [*LAYOUTS, "empty"])
    def test_opcheck(self, layout, device):
        x = (
            torch.zeros(0, 3, device=device)
            if layout == "empty"
            else layouts((7, 3), torch.float32, device)[layout]
        )
        g = layouts((7, 3), torch.float32, device)["permuted"][: len(x)]
        state = ClassStats.empty(2, 3, CONTRIBUTION_STATISTICS, device=device)
        planes = tuple(state.tensors().values())
        op = torch.ops.neusemslice.contribution_.default
        order = ops.class_order(torch.randint(0, 2, (x.shape[0],), device=device), 2)
        opcheck(op, (*planes, x, g, *order))
        opcheck(op, (*planes[:3], None, planes[4], x, g, *order))
        soft = ops.class_order(torch.rand(x.shape[0], 2, device=device), 2)
        opcheck(op, (*planes, x, g, *soft))

    @pytest.mark.parametrize(
        "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
    )
    def test_compiles_without_a_graph_break(self, backend, device):
        def step(state: ClassStats, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            y = (x * 2).relu()
            ops.contribution_(state, x, y, ops.class_order(labels, 3))
            return y

        x, labels = torch.randn(20, 6, device=device), torch.randint(0, 3, (20,), device=device)
        eager, compiled = (
            ClassStats.empty(3, 6, CONTRIBUTION_STATISTICS, device=device) for _ in range(2)
        )
        step(eager, x, labels)
        torch.compile(step, fullgraph=True, backend=backend)(compiled, x, labels)
        assert_same_bits(eager, compiled)
        torch.compiler.reset()

    def test_autocast_and_deterministic_mode(self, device):
        x, g = torch.randn(2, 20, 6, device=device)
        labels = torch.randint(0, 3, (20,), device=device)
        plain = contribute(x, g, labels, 3)
        torch.use_deterministic_algorithms(True)
        try:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                assert_same_bits(plain, contribute(x, g, labels, 3))
        finally:
            torch.use_deterministic_algorithms(False)
