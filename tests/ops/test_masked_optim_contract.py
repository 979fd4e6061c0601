"""What masked_sgd_ and masked_adamw_ refuse, and how they behave under torch's machinery."""

import pytest
import torch
from helpers import same_bits
from masked_problems import LAYOUTS, OPTIONS, Problem, param_layouts, problem
from torch import Tensor
from torch.library import opcheck

from neusemslice import ops


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
