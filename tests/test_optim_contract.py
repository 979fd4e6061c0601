"""MaskedSGD and MaskedAdamW: rows, options, refusals, hooks and closures."""

import warnings

import pytest
import torch
from helpers import same_bits
from optimizers import BOTH, LAYERS, Twins, simple, tuned
from torch import Tensor, nn

from neusemslice.optim import MaskedAdamW, MaskedSGD


class TestManners:
    @BOTH
    def test_state_is_that_of_the_tuned_rows(self, name, device):
        t = Twins(name, device)
        assert t.masked.state_bytes() == 0
        t.set_gradients(0)
        t.masked.step()
        kinds = {"nesterov": 1, "amsgrad": 3}[name]
        elements = sum(
            int(tuned(p, rows, dim).sum())
            for p, (_, dim, rows) in zip(t.params, LAYERS.values(), strict=True)
        )
        steps = sum(len(rows) for _, _, rows in LAYERS.values())
        assert t.masked.state_bytes() == 4 * (kinds * elements + steps)

    def test_without_momentum_there_is_no_state(self, device):
        t = Twins("sgd", device)
        t.set_gradients(0)
        t.masked.step()
        assert t.masked.state_bytes() == 0

    def test_parameters_without_a_gradient_are_skipped(self, device):
        t = Twins("adamw", device)
        t.set_gradients(0)
        t.params[1].grad = None
        t.masked.step()
        assert torch.equal(t.params[1], t.before[1])
        assert not torch.equal(t.params[0], t.before[0])
        assert t.params[1] not in t.masked.state
        t.masked.zero_grad()
        before = [p.detach().clone() for p in t.params]
        t.masked.step()
        assert all(torch.equal(p, b) for p, b in zip(t.params, before, strict=True))

    @pytest.mark.parametrize(
        "rows",
        [
            [1, 3],
            (1, 3),
            [False, True, False, True],
            torch.tensor([1, 3]),
            torch.tensor([False, True, False, True]),
        ],
        ids=str,
    )
    def test_rows_as_indices_or_mask(self, rows, device):
        p = nn.Parameter(torch.zeros(4, 2, device=device))
        optimizer = MaskedSGD([{"params": [p], "rows": [rows], "neuron_dims": [0]}], lr=1.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert p[:, 0].tolist() == [0, -1, 0, -1]
        kept = optimizer.param_groups[0]["rows"][0]
        assert kept.dtype == torch.int64
        assert kept.device == p.device

    def test_rows_are_a_copy_and_groups_are_not_changed(self, device):
        p = nn.Parameter(torch.zeros(4, 2, device=device))
        rows = torch.tensor([1, 3], device=device)
        given = {"params": [p], "rows": [rows], "neuron_dims": [-2]}
        optimizer = MaskedSGD([given])
        rows[0] = 0
        assert optimizer.param_groups[0]["rows"][0].tolist() == [1, 3]
        assert set(given) == {"params", "rows", "neuron_dims"}
        assert given["neuron_dims"] == [-2]

    def test_empty_rows(self, device):
        p, optimizer = simple(rows=(), device=device)
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(p, before)
        assert optimizer.state_bytes() == 0

    @pytest.mark.parametrize(
        ("rows", "error", "message"),
        [
            ([4], ValueError, r"must lie in \[0, 4\), got 4"),
            ([-1, 2], ValueError, r"must lie in \[0, 4\), got -1"),
            ([2, 1], ValueError, r"must rise without repeats, got \[2, 1\]"),
            ([1, 1], ValueError, "must rise without repeats"),
            ([True, False], ValueError, r"must be a mask of 4 neurons, got bool \[2\]"),
            ([[0, 1]], ValueError, r"must be int64 \[R\], got int64 \[1, 2\]"),
            ([[0], [1, 2]], ValueError, "must be indices or a mask of 4 neurons"),
            (torch.tensor([1.0]), TypeError, "must be int64 or bool, got torch.float32"),
            (torch.tensor([1], dtype=torch.int32), TypeError, "must be int64 or bool"),
        ],
        ids=str,
    )
    def test_refuses_wrong_rows(self, rows, error, message, device):
        p = nn.Parameter(torch.zeros(2, device=device))
        q, optimizer = simple(device=device)
        wrong = {"params": [p, nn.Parameter(q.detach().clone())], "rows": [[0], rows]}
        with pytest.raises(error, match=f"MaskedAdamW: parameter 1 of group 1: its rows {message}"):
            optimizer.add_param_group(wrong)
        assert len(optimizer.param_groups) == 1
        optimizer.step()
        state = {k: v.clone() for k, v in optimizer.state[q].items()}
        with pytest.raises(error, match=f"MaskedAdamW: parameter 0 of group 0: its rows {message}"):
            optimizer.set_rows(q, rows)
        assert optimizer.param_groups[0]["rows"][0].tolist() == [0, 2]
        assert all(torch.equal(v, state[k]) for k, v in optimizer.state[q].items())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"neuron_dims": [2]}, r"parameter 0 of group 0: its neuron dimension .* got 2"),
            ({"neuron_dims": [-3]}, r"parameter 0 of group 0: its neuron dimension .* got -3"),
            ({"neuron_dims": []}, "neuron_dims of group 0 must be a list of 1 entries.*got 0"),
            ({"rows": [[0], [1]]}, "rows of group 0 must be a list of 1 entries.*got 2"),
            ({"rows": torch.tensor([0])}, "rows of group 0 must be a list.*got Tensor"),
        ],
    )
    def test_refuses_groups_that_do_not_fit(self, change, message, device):
        p = nn.Parameter(torch.zeros(4, 3, device=device))
        with pytest.raises(ValueError, match=message):
            MaskedSGD([{"params": [p], "rows": [[0]], "neuron_dims": [0], **change}])

    def test_refuses_a_parameter_twice_and_other_dtypes(self, device):
        p = nn.Parameter(torch.zeros(4, 3, device=device))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, that this will be an error
            with pytest.raises(ValueError, match="parameter 1 of group 0 is in the group twice"):
                MaskedSGD([p, p])
        z = nn.Parameter(torch.zeros(3, dtype=torch.complex64, device=device))
        with pytest.raises(TypeError, match=r"parameter 1 of group 0 must be float64.*complex64"):
            MaskedSGD([p, z])

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda p: MaskedSGD(p, lr=-1.0), "MaskedSGD: lr must be at least 0, got -1"),
            (lambda p: MaskedSGD(p, lr=torch.ones(2)), "lr must have one element"),
            (lambda p: MaskedSGD(p, momentum=-0.1), "momentum must be at least 0, got -0.1"),
            (lambda p: MaskedSGD(p, weight_decay=-0.1), "weight_decay must be at least 0"),
            (lambda p: MaskedSGD(p, nesterov=True), "nesterov needs a momentum above 0"),
            (
                lambda p: MaskedSGD(p, momentum=0.9, dampening=0.1, nesterov=True),
                "nesterov needs a momentum above 0 and no dampening.*0.9 and dampening 0.1",
            ),
            (lambda p: MaskedAdamW(p, betas=(1.0, 0.9)), r"betas\[0\] must lie in \[0, 1\)"),
            (lambda p: MaskedAdamW(p, betas=(0.9, -1)), r"betas\[1\] must lie in \[0, 1\)"),
            (lambda p: MaskedAdamW(p, eps=-1.0), "eps must be at least 0"),
            (lambda p: MaskedAdamW([]), "empty parameter list"),
        ],
    )
    def test_refuses_options_out_of_range(self, make, message):
        with pytest.raises(ValueError, match=message):
            make([nn.Parameter(torch.zeros(2))])

    def test_refuses_sparse_gradients_before_anything_changes(self):
        p = nn.Parameter(torch.ones(4, 3))
        table = nn.Embedding(5, 2, sparse=True)
        optimizer = MaskedAdamW([{"params": [p]}, {"params": table.parameters()}])
        p.grad = torch.ones_like(p)
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(ValueError, match="parameter 0 of group 1 has a sparse gradient"):
            optimizer.step()
        assert torch.equal(p, torch.ones(4, 3))
        assert optimizer.state_bytes() == 0

    def test_set_rows_keeps_the_state_of_rows_that_stay(self, device):
        p, optimizer = simple(device=device)
        optimizer.step()
        old = dict(optimizer.state[p])
        optimizer.set_rows(p, [False, True, True, False])
        for key, state in optimizer.state[p].items():
            assert state.shape[0] == 2
            assert torch.equal(state[1], old[key][1])
            assert (state[0] == 0).all()
        optimizer.set_rows(p, [])
        assert optimizer.state_bytes() == 0
        optimizer.set_rows(p, [0, 1, 2])
        optimizer.step()
        assert optimizer.state[p]["step"].tolist() == [1, 1, 1]
        with pytest.raises(ValueError, match="belongs to none of the groups"):
            optimizer.set_rows(nn.Parameter(torch.zeros(2)), [0])

    def test_set_rows_along_another_dimension_and_before_the_first_step(self, device):
        p = nn.Parameter(torch.ones(3, 4, device=device))
        optimizer = MaskedAdamW([{"params": [p], "rows": [[0, 1]], "neuron_dims": [1]}])
        optimizer.set_rows(p, [1, 3])
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert (p[:, [0, 2]] == 1).all()
        assert (p[:, [1, 3]] < 1).all()
        optimizer.set_rows(p, [2, 3])
        assert optimizer.state[p]["step"].tolist() == [0, 1]
        assert (optimizer.state[p]["exp_avg"][:, 0] == 0).all()
        assert (optimizer.state[p]["exp_avg"][:, 1] != 0).all()

    def test_closure(self, device):
        p, optimizer = simple(device=device)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        before = p.detach().clone()
        loss = optimizer.step(closure)
        assert loss.item() == before.square().sum().item()
        assert torch.equal(p.grad, 2 * before)
        assert not torch.equal(p[0], before[0])
        assert optimizer.step() is None

    def test_hooks_run(self, device):
        _, optimizer = simple(device=device)
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        optimizer.step()
        assert seen == ["before", "after"]

    def test_a_stale_graph_raises(self, device):
        for start in (torch.ones(3, device=device), torch.tensor(1.0, device=device)):
            p = nn.Parameter(start)
            optimizer = MaskedSGD([p], lr=0.1)
            loss = p.square().sum()
            p.grad = torch.ones_like(p)
            optimizer.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()

    def test_added_group(self, device):
        _, optimizer = simple(device=device)
        p = nn.Parameter(torch.ones(4, 2, device=device))
        optimizer.add_param_group({"params": p, "rows": [[3]], "lr": 0.5, "amsgrad": False})
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert (p[:3] == 1).all()
        assert (p[3] < 0.6).any() or (p[3] > 1.4).any()
        assert "max_exp_avg_sq" not in optimizer.state[p]
        with pytest.raises(TypeError, match="param_group must be a dict"):
            optimizer.add_param_group([p])

    @BOTH
    def test_compiled_step(self, name, device):
        p, optimizer = simple(name, device)
        q, compiled = simple(name, device)
        step = torch.compile(compiled.step, backend="aot_eager")
        for _ in range(3):
            optimizer.step()
            step()
        assert same_bits(p.detach(), q.detach())
        torch.compiler.reset()
