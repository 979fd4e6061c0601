"""masked_sgd_ and masked_adamw_ against float64 oracles, torch.optim and themselves."""

import itertools

import pytest
import torch
from helpers import num_threads, same_bits
from hypothesis import given
from hypothesis import strategies as st
from masked_problems import DTYPES, LAYOUTS, OPTIONS, param_layouts, problem

from neusemslice import _C


class TestValues:
    @pytest.mark.parametrize(("kind", "options"), OPTIONS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_equals_the_oracle(self, kind, options, dtype, layout, device):
        p = problem(kind, options)
        for shape, dim in itertools.product([(7, 5), (4, 3, 2, 6)], [0, 1, -1]):
            for compact in (False, True):
                param = param_layouts(shape, dtype, device)[layout]
                size = shape[dim]
                p.add(param, sorted({0, size // 2, size - 1}), dim, steps=3, compact=compact)
        p.add(torch.randn(9, dtype=torch.float64, device=device).to(dtype), [1, 2, 7])
        p.check()
        p.check()

    @pytest.mark.parametrize(("kind", "options"), OPTIONS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_wide_lines_and_whole_parameters(self, kind, options, dtype, device):
        p = problem(kind, options)
        for shape, dim, rows in (
            ((6, 83), 0, [1, 2, 5]),
            ((3, 90), 1, [0, *range(20, 57), 60, 88]),
            ((4, 5, 40), 1, [0, 3]),
            ((7, 3, 5), 0, range(7)),
            ((7, 3, 5), -1, range(5)),
            ((70,), 0, range(70)),
            ((5000,), 0, range(3, 4999)),
        ):
            for compact in (False, True):
                param = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
                p.add(param, list(rows), dim, steps=2, compact=compact)
        p.check()

    @pytest.mark.parametrize(("kind", "options"), OPTIONS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_master_rows(self, kind, options, dtype, layout, device):
        p = problem(kind, options)
        for dim in (0, 1):
            param = param_layouts((21, 37), dtype, device)[layout]
            p.add(param, [0, 3, 4, 20], dim, steps=3, master=True)
        for _ in range(3):
            p.check()

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_a_master_gathers_what_its_parameter_rounds_away(self, kind, device):
        p = problem(kind, {}).add(torch.ones(2, 20, device=device).bfloat16(), [1], master=True)
        p.masters[0].fill_(1)
        p.lr.fill_(1e-3)  # a quarter of what bfloat16 tells from 1
        for _ in range(8):
            p.grads[0].fill_(1)
            p.step()
        assert (p.params[0][1] < 1).all()
        assert (p.params[0][0] == 1).all()

    @pytest.mark.parametrize(("kind", "options"), OPTIONS)
    def test_from_the_first_step_on(self, kind, options, device):
        p = problem(kind, options).add(torch.randn(6, 4, device=device), [0, 3, 4])
        for _ in range(3):
            p.check()

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    @pytest.mark.parametrize("dim", [0, 1])
    def test_channels_last_parameters_and_gradients(self, kind, dim, device):
        p = problem(kind, "decay")
        for param_last, grad_last in itertools.product([False, True], repeat=2):
            param = torch.randn(6, 5, 3, 3, device=device)
            if param_last:
                param = param.to(memory_format=torch.channels_last)
            p.add(param, [1, 2, 4], dim, steps=2)
            if grad_last:
                p.grads[-1] = p.grads[-1].to(memory_format=torch.channels_last)
        p.check()

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_gradients_of_any_strides(self, kind, device):
        p = problem(kind, "decay")
        p.add(torch.randn(6, 4, device=device), [0, 5])
        p.grads[0] = torch.randn(12, 4, device=device)[::2]
        p.add(torch.randn(6, 4, device=device), [0, 5])
        p.grads[1] = torch.randn(4, 6, device=device).t()
        p.add(torch.randn(6, 4, device=device), [0, 5])
        p.grads[2] = torch.randn(1, 4, device=device).expand(6, 4)
        p.rows[2] = torch.tensor([0, 9, 5, 9], device=device)[::2]
        p.check()

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_mixed_dtypes_in_one_call(self, kind, device):
        p = problem(kind, "decay")
        for dtype in DTYPES:
            p.add(torch.randn(6, 4, device=device).to(dtype), [0, 5], steps=1)
        p.check()

    @given(
        st.sampled_from(OPTIONS),
        st.lists(st.integers(0, 4), min_size=1, max_size=4),
        st.integers(0, 3),
        st.sets(st.integers(0, 3)),
        st.booleans(),
        st.permutations(range(4)),
    )
    def test_any_shape(self, options, shape, dim, rows, compact, order):
        dim %= len(shape)
        order = [d for d in order if d < len(shape)]
        stored = torch.randn([shape[d] for d in order], dtype=torch.float64)
        param = stored.permute([order.index(d) for d in range(len(shape))])
        assert list(param.shape) == shape
        kept = sorted(row for row in rows if row < shape[dim])
        problem(*options).add(param, kept, dim, steps=1, compact=compact).check()

    @pytest.mark.parametrize(("kind", "options"), OPTIONS)
    def test_every_row_has_its_own_number_of_steps(self, kind, options, device):
        p = problem(kind, options).add(torch.randn(4, 3, device=device), [0, 1, 3], steps=5)
        if p.names:
            p.steps[0][1] = 0
            for state in p.states[: len(p.names)]:
                state[0][1] = 0
        p.check()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize(("kind", "options"), [o for o in OPTIONS if o[1] != "slow"])
    def test_follows_torch(self, kind, options, dtype, device):
        param = torch.randn(8, 6, dtype=dtype, device=device)
        rows = [0, 2, 3, 7]
        p = problem(kind, options).add(param.clone(), rows)
        other = param.clone().requires_grad_()
        named = dict(p.options)
        if kind == "adamw":
            named["betas"] = (named.pop("beta1", 0.9), named.pop("beta2", 0.999))
            named = {"decoupled_weight_decay": True, "weight_decay": 0.01, **named}
        peer = {"sgd": torch.optim.SGD, "adamw": torch.optim.Adam}[kind]([other], 0.05, **named)
        for _ in range(20):
            other.grad = torch.randn_like(param)
            p.grads[0] = other.grad
            peer.step()
            p.step()
        limit = (1e-6 if dtype == torch.float32 else 1e-14) * other.abs().max()
        assert (p.params[0] - other)[rows].abs().max() <= limit
        assert torch.equal(p.params[0][[1, 4, 5, 6]], param[[1, 4, 5, 6]])

    def test_a_gradient_that_is_not_finite_spoils_its_own_element(self, device):
        p = problem("adamw", "amsgrad").add(torch.randn(3, 2, device=device), [0, 2])
        p.grads[0][0, 1] = torch.nan
        p.grads[0][1] = torch.nan
        before = p.params[0].clone()
        p.step()
        assert p.params[0].isnan().tolist() == [[False, True], [False, False], [False, False]]
        assert torch.equal(p.params[0][1], before[1])
        assert p.states[2][0].isnan().tolist() == [[False, True], [False, False]]


class TestScalars:
    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_learning_rate_on_either_device(self, kind, dtype, device):
        results = []
        for where in ("cpu", device):
            torch.manual_seed(1)
            p = problem(kind, "decay").add(torch.randn(5, 3, device=device), [1, 4])
            p.lr = torch.tensor(0.03, dtype=dtype, device=where)
            p.check()
            results.append(p.copies())
        for a, b in zip(*results, strict=True):
            assert same_bits(a, b)

    @pytest.mark.parametrize(("kind", "options"), OPTIONS)
    @pytest.mark.parametrize("shape", [(), (1,)], ids=str)
    def test_grad_scale(self, kind, options, shape, device):
        p = problem(kind, options).add(torch.randn(5, 3, device=device), [1, 4], steps=1)
        scale = torch.full(shape, 512.0, device=device)
        p.grads[0] *= 512
        grad = p.grads[0].clone()
        p.check(512.0, grad_scale=scale, found_inf=torch.zeros(shape, device=device))
        assert torch.equal(p.grads[0], grad)

    @pytest.mark.parametrize(("kind", "options"), OPTIONS)
    def test_found_inf_changes_nothing(self, kind, options, device):
        p = problem(kind, options).add(torch.randn(5, 3, device=device), [1, 4], steps=1)
        p.grads[0][1, 1] = torch.inf
        before = p.copies()
        p.step(found_inf=torch.ones(1, device=device))
        for tensor, old in zip(p.tensors(), before, strict=True):
            assert same_bits(tensor, old)


class TestDeterminism:
    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    @pytest.mark.parametrize("dim", [0, 1])
    def test_same_bits_twice_and_at_any_thread_count(self, kind, dim):
        results = []
        for threads in (1, 1, 2):
            torch.manual_seed(2)
            p = problem(kind, "decay").add(torch.randn(300, 400), list(range(0, 300, 2)), dim)
            with num_threads(threads):
                p.step()
                p.step()
            results.append(p.copies())
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert same_bits(a, b)

    @pytest.mark.parametrize(("kind", "options"), OPTIONS)
    def test_same_bits_on_every_instruction_set(self, kind, options, each_capability):
        results = []
        for name in each_capability:
            _C.set_cpu_capability(name)
            torch.manual_seed(2)
            p = problem(kind, options)
            for dtype in DTYPES:
                for shape, dim in (((9, 75), 0), ((9, 75), 1), ((40,), 0)):
                    param = torch.randn(shape, dtype=torch.float64).to(dtype)
                    p.add(param, [0, 1, 3, 7, 8], dim, steps=2)
                    p.steps and p.steps[-1][1:].fill_(5)
                p.add(torch.randn(9, 75, dtype=torch.float64).to(dtype), list(range(9)))
            special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-7, 6e4, 3e38]
            p.grads[0].view(-1)[:8] = torch.tensor(special)
            for _ in range(3):
                p.step(grad_scale=torch.full((), 3.0))
            half = problem(kind, options)
            for dtype in (torch.float16, torch.bfloat16):
                values = torch.randn(9, 75, dtype=torch.float64) * 10.0 ** torch.arange(
                    -9.0, 0
                ).view(-1, 1)
                half.add(values.to(dtype), [0, 3, 4, 7, 8], master=True)
            half.step()
            results.append([*p.copies(), *half.copies()])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert same_bits(a, b)

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_same_bits_twice_on_the_device(self, kind, device):
        results = []
        for _ in range(2):
            torch.manual_seed(2)
            p = problem(kind, "decay").add(torch.randn(64, 130, device=device), [3, 60])
            p.step()
            results.append(p.copies())
        for a, b in zip(*results, strict=True):
            assert same_bits(a, b)

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_compact_gradient_gives_the_same_bits(self, kind, device):
        full = problem(kind, "decay").add(torch.randn(6, 4, device=device), [0, 2, 5])
        compact = problem(kind, "decay").add(full.params[0].clone(), [0, 2, 5])
        compact.grads[0] = full.grads[0][[0, 2, 5]]
        full.step()
        compact.step()
        for a, b in zip(full.tensors(), compact.tensors(), strict=True):
            assert same_bits(a, b)
