"""masked_sgd_ and masked_adamw_ against float64 oracles, torch.optim, contracts and laws."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from helpers import num_threads, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from neusemslice import _C, ops, reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "sliced", "permuted", "requires_grad"]
SGD = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "maximize": True},
    "momentum": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
}
ADAMW = {
    "plain": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3},
    "amsgrad": {"amsgrad": True, "maximize": True},
    "slow": {"beta1": 0.3, "beta2": 0.5},
    "coupled": {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True},
}
OPTIONS = [("sgd", name) for name in SGD] + [("adamw", name) for name in ADAMW]


@dataclass
class Problem:
    """Parameters with gradients and state, and one step over all of them."""

    kind: str
    options: dict
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=lambda: [[], [], []])
    masters: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    dims: list[int] = field(default_factory=list)
    lr: Tensor = field(default_factory=lambda: torch.tensor(0.05, dtype=torch.float64))

    @property
    def names(self) -> list[str]:
        if self.kind == "sgd":
            return ["momentum_buffer"] if self.options.get("momentum") else []
        extra = ["max_exp_avg_sq"] if self.options.get("amsgrad") else []
        return ["exp_avg", "exp_avg_sq", *extra]

    def add(
        self,
        param: Tensor,
        rows: list[int],
        dim: int = 0,
        steps: float = 0,
        compact: bool = False,
        master: bool = False,
    ) -> "Problem":
        index = torch.tensor(rows, dtype=torch.int64, device=param.device)
        shape = list(param.shape)
        shape[dim] = len(rows)
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32

        def random(size, dtype):
            values = torch.randn(size, dtype=torch.float64, device=param.device)
            return values.to(dtype)

        self.params.append(param)
        self.grads.append(random(shape if compact else list(param.shape), param.dtype))
        if self.names:
            counts = torch.full((len(rows),), steps, dtype=torch.float32, device=param.device)
            self.steps.append(counts)
        for kind in range(len(self.names)):
            state = random(shape, dtype).abs() if steps else torch.zeros(shape, dtype=dtype)
            self.states[kind].append(state.to(param.device))
        if master:
            # More than the parameter can hold, and the parameter its rounding, as after a step.
            exact = param.detach().index_select(dim, index).float()
            exact = exact * (1 + torch.rand_like(exact) * torch.finfo(param.dtype).eps / 8)
            param.detach().index_copy_(dim, index, exact.to(param.dtype))
            self.masters.append(exact.contiguous())
        self.rows.append(index)
        self.dims.append(dim)
        return self

    @property
    def arguments(self) -> tuple:
        kinds = 1 if self.kind == "sgd" else 3
        return (
            self.params,
            self.grads,
            *self.states[:kinds],
            self.masters,
            self.steps,
            self.rows,
            self.dims,
            self.lr,
        )

    def step(self, **scalars) -> None:
        op = ops.masked_sgd_ if self.kind == "sgd" else ops.masked_adamw_
        op(*self.arguments, **self.options, **scalars)

    def expected(self, grad_scale: float = 1.0) -> list[dict[str, Tensor]]:
        """What the oracle makes of every parameter."""
        results = []
        for i, param in enumerate(self.params):
            states = [kind[i].cpu() if kind else None for kind in self.states]
            call = {"sgd": reference.masked_sgd, "adamw": reference.masked_adamw}[self.kind]
            results.append(
                call(
                    param.detach().cpu(),
                    self.grads[i].cpu(),
                    *(states[:1] if self.kind == "sgd" else states),
                    self.steps[i].cpu() if self.steps else None,
                    self.rows[i].cpu(),
                    self.dims[i],
                    lr=self.lr.item(),
                    grad_scale=grad_scale,
                    master=self.masters[i].cpu() if self.masters else None,
                    **self.options,
                )
            )
        return results

    def tensors(self) -> list[Tensor]:
        """All that a step may change."""
        return [*self.params, *itertools.chain(*self.states), *self.masters, *self.steps]

    def copies(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.tensors()]

    def untouched(self, i: int) -> Tensor:
        """True where parameter `i` must keep its bits."""
        mask = torch.ones(self.params[i].shape, dtype=torch.bool)
        return mask.index_fill(self.dims[i], self.rows[i].cpu(), False)

    def check(self, scale: float = 1.0, **scalars) -> None:
        """Takes a step and compares everything with the oracle."""
        expected = self.expected(scale)
        before = self.copies()
        self.step(**scalars)
        for i, (param, wanted) in enumerate(zip(self.params, expected, strict=True)):
            # One rounding to the parameter's dtype, beside the arithmetic's own.
            state_dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
            rounding = 8 * torch.finfo(state_dtype).eps
            got, want = param.detach().cpu(), wanted["param"]
            torch.testing.assert_close(
                got.double(), want, rtol=torch.finfo(param.dtype).eps, atol=rounding
            )
            frozen = self.untouched(i)
            assert torch.equal(got[frozen], before[i].cpu()[frozen])
            for kind, name in enumerate(self.names):
                state = self.states[kind][i]
                assert state.dtype == state_dtype
                torch.testing.assert_close(
                    state.double().cpu(), wanted[name], rtol=rounding, atol=rounding
                )
            if self.masters:
                tuned = wanted["param"].index_select(self.dims[i], self.rows[i].cpu())
                master = self.masters[i].cpu()
                torch.testing.assert_close(master.double(), tuned, rtol=rounding, atol=rounding)
                assert torch.equal(
                    got.index_select(self.dims[i], self.rows[i].cpu()), master.to(got.dtype)
                )
            if self.names:
                assert self.steps[i].tolist() == wanted["step"].tolist()


def problem(kind: str, options: str | dict) -> Problem:
    named = {"sgd": SGD, "adamw": ADAMW}[kind]
    return Problem(kind, dict(named[options] if isinstance(options, str) else options))


def param_layouts(shape, dtype, device) -> dict[str, Tensor]:
    """One random parameter in the layouts that parameters come in."""
    x = torch.randn(*shape, dtype=torch.float64, device=device).to(dtype)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64, device=device).to(dtype)
    return {
        "contiguous": x,
        "sliced": wide[..., ::2],
        "permuted": x.transpose(0, -1).contiguous().transpose(0, -1),
        "requires_grad": x.clone().requires_grad_(),
    }


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


class TestContract:
    @pytest.mark.parametrize(("kind", "options"), OPTIONS)
    def test_empty_lists_and_empty_rows(self, kind, options, device):
        problem(kind, options).step()
        p = problem(kind, options)
        p.add(torch.randn(4, 3, device=device), [])
        p.add(torch.zeros(0, 3, device=device), [])
        p.add(torch.zeros(3, 0, device=device), [0, 2])
        p.add(torch.zeros(3, 0, device=device), [], 1)
        p.check()

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_backward_over_a_stale_graph_raises(self, kind, device):
        options = {"sgd": "momentum", "adamw": "amsgrad"}[kind]
        p = problem(kind, options).add(torch.randn(4, 3, device=device), [1])
        for tensor in p.tensors():
            factor = torch.ones_like(tensor, requires_grad=True)
            loss = (tensor * factor).sum()
            p.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"grads": []}, ValueError, "grads must hold 2 items.*got 0"),
            ({"exp_avgs": []}, ValueError, "exp_avgs must hold 2 items.*got 0"),
            ({"max_exp_avg_sqs": [torch.zeros(1, 3)] * 2}, ValueError, "max_exp_avg_sqs.*0 items"),
            ({"steps": []}, ValueError, "steps must hold 2 items.*got 0"),
            ({"rows": []}, ValueError, "rows must hold 2 items.*got 0"),
            ({"neuron_dims": [0]}, ValueError, "neuron_dims must hold 2 items.*got 1"),
            ({"neuron_dims": [0, 2]}, ValueError, r"neuron_dims\[1\] must name a dimension.*got 2"),
            (
                {"params": torch.zeros(4, 3, dtype=torch.int64)},
                TypeError,
                r"params\[1\] must be float64.*got int64",
            ),
            ({"params": torch.zeros(())}, ValueError, r"params\[1\] must have at least one dim"),
            (
                {"params": torch.zeros(1, 3).expand(4, 3)},
                ValueError,
                r"params\[1\] must not have two elements in one place",
            ),
            ({"grads": torch.zeros(4, 4)}, ValueError, r"grads\[1\] must have shape \[4, 3\] or"),
            (
                {"grads": torch.zeros(4, 3, dtype=torch.float64)},
                TypeError,
                r"grads\[1\] must be float32, got float64",
            ),
            (
                {"exp_avg_sqs": torch.zeros(4, 3)},
                ValueError,
                r"exp_avg_sqs\[1\] must have shape \[1, 3\], got float32 \[4, 3\]",
            ),
            (
                {"exp_avgs": torch.zeros(1, 3, dtype=torch.bfloat16)},
                TypeError,
                r"exp_avgs\[1\] must be float32, got bfloat16",
            ),
            ({"masters": [torch.zeros(1, 3)]}, ValueError, "masters must hold 2 items.*got 1"),
            (
                {"masters": [torch.zeros(2, 2), torch.zeros(1, 3)]},
                TypeError,
                r"params\[0\] must be float16 or bfloat16 to have a master, got float32",
            ),
            (
                {"exp_avgs": torch.zeros(1, 6)[:, ::2]},
                ValueError,
                r"exp_avgs\[1\] must be contiguous",
            ),
            ({"steps": torch.zeros(2)}, ValueError, r"steps\[1\] must have shape \[1\]"),
            (
                {"steps": torch.zeros(1, dtype=torch.int64)},
                TypeError,
                r"steps\[1\] must be float32, got int64",
            ),
            (
                {"rows": torch.zeros(1, dtype=torch.int32)},
                TypeError,
                r"rows\[1\] must be int64, got int32",
            ),
            (
                {"rows": torch.zeros(1, 1, dtype=torch.int64)},
                ValueError,
                r"rows\[1\] must be int64 \[R\], got int64 \[1, 1\]",
            ),
            ({"lr": torch.tensor(1)}, TypeError, "lr must be float64 or float32, got int64"),
            ({"lr": torch.zeros(1)}, ValueError, r"lr must have shape \[\], got float32 \[1\]"),
            (
                {"grad_scale": torch.ones(2)},
                ValueError,
                r"grad_scale must have one element, got float32 \[2\]",
            ),
            (
                {"found_inf": torch.ones(1, dtype=torch.float64)},
                TypeError,
                "found_inf must be float32, got float64",
            ),
            ({"beta1": 1.0}, ValueError, r"beta1 must lie in \[0, 1\), got 1"),
            ({"beta2": -0.1}, ValueError, r"beta2 must lie in \[0, 1\), got -0.1"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_refuses_and_changes_nothing(self, change, error, message, device):
        names = (
            "params grads exp_avgs exp_avg_sqs max_exp_avg_sqs masters steps rows neuron_dims lr"
        )
        p = problem("adamw", {})
        p.add(torch.randn(5, 2, device=device), [1, 3]).add(torch.randn(4, 3, device=device), [2])
        arguments = dict(zip(names.split(), p.arguments, strict=True))
        before = p.copies()
        for name, value in change.items():
            bad = value.to(device) if isinstance(value, Tensor) else value
            listed = isinstance(arguments.get(name), list) and isinstance(bad, Tensor)
            arguments[name] = [arguments[name][0], bad] if listed else bad
        with pytest.raises(error, match=f"masked_adamw_: {message}"):
            ops.masked_adamw_(**arguments)
        for tensor, old in zip(p.tensors(), before, strict=True):
            assert same_bits(tensor, old)

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([0, 4], r"rows\[1\] must lie in \[0, 4\), got 4 at index 1"),
            ([-1, 2], r"rows\[1\] must lie in \[0, 4\), got -1 at index 0"),
            ([2**40, 2], r"rows\[1\] must lie in \[0, 4\)"),
            ([1, 1], r"rows\[1\] must rise without repeats, got 1 after 1 at index 1"),
            ([3, 1], r"rows\[1\] must rise without repeats, got 1 after 3 at index 1"),
        ],
    )
    def test_refuses_wrong_rows_on_the_cpu(self, kind, rows, message):
        p = problem(kind, "decay").add(torch.randn(5, 2), [1]).add(torch.randn(4, 3), [0, 1])
        p.rows[1] = torch.tensor(rows)
        before = p.copies()
        with pytest.raises(ValueError, match=f"masked_{kind}_: {message}"):
            p.step()
        for tensor, old in zip(p.tensors(), before, strict=True):
            assert same_bits(tensor, old)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_skips_rows_out_of_range_on_cuda(self, kind):
        p = problem(kind, "decay").add(torch.randn(4, 3, device="cuda"), [1, 2])
        q = problem(kind, "decay").add(p.params[0].clone(), [0, 1, 2, 3])
        q.grads = p.grads
        q.rows[0] = torch.tensor([-1, 1, 2, 2**40], device="cuda")
        p.step()
        q.step()
        assert same_bits(p.params[0], q.params[0])

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_a_captured_graph_follows_the_learning_rate(self, kind):
        torch.manual_seed(3)
        p = problem(kind, "decay").add(torch.randn(4, 3, device="cuda"), [1, 2])
        torch.manual_seed(3)
        q = problem(kind, "decay").add(torch.randn(4, 3, device="cuda"), [1, 2])
        for each in (p, q):
            each.lr = torch.tensor(0.1, device="cuda")
            each.step()  # warms up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            p.step()
        for value in (0.2, 0.05):
            p.lr.fill_(value)
            q.lr.fill_(value)
            graph.replay()
            q.step()
        assert same_bits(p.params[0], q.params[0])

    @pytest.mark.parametrize(
        "options", [{"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}]
    )
    def test_refuses_nesterov_without_momentum_or_with_dampening(self, options, device):
        with pytest.raises(ValueError, match="masked_sgd_: nesterov needs a momentum above 0"):
            problem("sgd", options).add(torch.randn(4, 3, device=device), [1]).step()

    def test_refuses_mixed_devices(self):
        p = problem("sgd", "plain").add(torch.randn(4, 3), [1]).add(torch.randn(4, 3), [1])
        p.params[1] = torch.randn(4, 3, device="meta")
        with pytest.raises(ValueError, match=r"masked_sgd_: all tensors must be on one device"):
            p.step()


class TestTorch:
    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    @pytest.mark.parametrize("layout", [*LAYOUTS, "empty", "no_rows", "no_params"])
    def test_opcheck(self, kind, layout, device):
        p = problem(kind, {"sgd": "momentum", "adamw": "amsgrad"}[kind])
        if layout == "empty":
            p.add(torch.zeros(0, 3, device=device), [])
        elif layout == "no_rows":
            p.add(torch.randn(4, 3, device=device), [])
        elif layout != "no_params":
            for dim in (0, 1):
                p.add(param_layouts((7, 5), torch.float32, device)[layout], [0, 2, 4], dim)
        op = getattr(torch.ops.neusemslice, f"masked_{kind}_").default
        opcheck(op, p.arguments, p.options)

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_opcheck_without_optional_state(self, kind, device):
        p = problem(kind, "plain")
        p.add(torch.randn(4, 3, device=device).bfloat16(), [0, 2], master=True)
        scalars = {
            "grad_scale": torch.ones(1, device=device),
            "found_inf": torch.zeros(1, device=device),
        }
        op = getattr(torch.ops.neusemslice, f"masked_{kind}_").default
        opcheck(op, p.arguments, {**p.options, **scalars})

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    @pytest.mark.parametrize(
        "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
    )
    def test_compiles_without_a_graph_break(self, kind, backend, device):
        def step(p: Problem, factor: Tensor) -> Tensor:
            p.grads[0] = p.params[1] * factor
            p.step()
            return p.params[0].sum()

        results = []
        options = {"sgd": "momentum", "adamw": "amsgrad"}[kind]
        for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
            torch.manual_seed(4)
            p = problem(kind, options)
            p.add(torch.randn(6, 5, device=device), [0, 3]).add(
                torch.randn(6, 5, device=device), [2]
            )
            with torch.no_grad():
                results.append([function(p, torch.full((1,), 2.0, device=device)), *p.copies()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        torch.compiler.reset()

    def test_autocast_and_deterministic_mode(self, device):
        results = []
        for special in (False, True):
            torch.manual_seed(5)
            p = problem("adamw", "amsgrad").add(torch.randn(6, 5, device=device), [0, 3])
            torch.use_deterministic_algorithms(special)
            try:
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=special):
                    p.step()
            finally:
                torch.use_deterministic_algorithms(False)
            results.append(p.copies())
        for a, b in zip(*results, strict=True):
            assert same_bits(a, b)
