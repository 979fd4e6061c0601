"""MaskedSGD and MaskedAdamW: state saved, loaded, and converted from and to torch."""

import copy
import io

import pytest
import torch
from helpers import same_bits
from optimizers import EVERY, LAYERS, OPTIMIZERS, Twins, simple, tuned
from torch import nn

from neusemslice.optim import MaskedAdamW, MaskedSGD


class TestStateDict:
    def halves(self, name, device, reload):
        """Twelve steps, with `reload(optimizer, params)` giving what goes on after six."""
        t = Twins(name, device)
        params, optimizer = t.params, t.masked
        for step in range(12):
            if step == 6:
                optimizer, params = reload(optimizer, params)
            for p, grad in zip(params, t.gradients[step], strict=True):
                p.grad = grad.clone()
            optimizer.step()
        return [p.detach() for p in params], optimizer

    def fresh(self, name, params, device):
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        masked, _, settings = OPTIMIZERS[name]
        return copies, masked([{"params": copies}], **{**settings, "lr": 0.5})

    @EVERY
    @pytest.mark.parametrize("through_a_file", [False, True])
    def test_round_trip_continues_with_the_same_bits(self, name, through_a_file, device):
        def reload(optimizer, params):
            state = optimizer.state_dict()
            if through_a_file:
                file = io.BytesIO()
                torch.save(state, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
            copies, other = self.fresh(name, params, device)
            other.load_state_dict(state)
            return other, copies

        straight, first = self.halves(name, device, lambda o, p: (o, p))
        continued, second = self.halves(name, device, reload)
        assert all(same_bits(a, b) for a, b in zip(straight, continued, strict=True))
        assert first.state_bytes() == second.state_bytes()

    def test_copied_and_pickled(self, device):
        straight, _ = self.halves("amsgrad", device, lambda o, p: (o, p))

        def copied(optimizer, params):
            both = copy.deepcopy((optimizer, params))
            assert both[0]._step_supports_amp_scaling
            return both

        continued, _ = self.halves("amsgrad", device, copied)
        assert all(same_bits(a, b) for a, b in zip(straight, continued, strict=True))

    def test_half_precision_state_stays_wide_and_is_not_shared(self, device):
        def make():
            torch.manual_seed(4)
            p = nn.Parameter(torch.randn(4, 3, device=device).bfloat16())
            p.grad = torch.randn_like(p)
            return p, MaskedAdamW([{"params": [p], "rows": [[0, 2]]}])

        (p, optimizer), (q, other) = make(), make()
        optimizer.step()
        saved = optimizer.state_dict()
        other.load_state_dict(saved)
        for key, state in other.state[q].items():
            assert state.dtype == torch.float32
            assert torch.equal(state, optimizer.state[p][key])
        before = other.state[q]["exp_avg"].clone()
        optimizer.step()
        assert torch.equal(other.state[q]["exp_avg"], before)

    def test_the_users_hooks_see_the_final_state(self, device):
        p, optimizer = simple(device=device)
        optimizer.step()
        q, other = simple(device=device)

        def rename(_, state):
            group = {**state["param_groups"][0], "lr": 0.25}
            return {**state, "param_groups": [group]}

        seen = []
        other.register_load_state_dict_pre_hook(rename)
        other.register_load_state_dict_post_hook(
            lambda o: seen.append(o.state[q]["exp_avg"].clone())
        )
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["lr"] == 0.25
        assert torch.equal(seen[0], optimizer.state[p]["exp_avg"])
        assert len(other._optimizer_load_state_dict_pre_hooks) == 1

    def test_a_saved_state_outlives_changed_rows(self, device):
        p, optimizer = simple(device=device)
        optimizer.step()
        saved = optimizer.state_dict()
        optimizer.set_rows(p, [1])
        optimizer.step()
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["rows"][0].tolist() == [0, 2]
        assert optimizer.state[p]["step"].tolist() == [1, 1]

    def test_refuses_what_does_not_fit_and_changes_nothing(self, device):
        _, optimizer = simple(device=device)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        twin = nn.Parameter(torch.zeros(4, 3, device=device))
        dense = torch.optim.AdamW([twin])
        dense_state = dense.state_dict()
        sgd_state = simple("nesterov", device)[1].state_dict()
        outside = copy.deepcopy(saved)
        outside["param_groups"][0]["rows"] = [[0, 4]]
        narrow = copy.deepcopy(saved)
        narrow["state"][0]["exp_avg"] = narrow["state"][0]["exp_avg"][:1]
        more = copy.deepcopy(saved)
        more["param_groups"] *= 2
        for bad, message in (
            (
                dense_state,
                "group 0 of the loaded state has no master_weights, neuron_dims, rows; it was",
            ),
            (
                sgd_state,
                "has no amsgrad, betas, decoupled_weight_decay, eps; it was not saved by a Mask",
            ),
            (outside, r"parameter 0 of group 0: its rows must lie in \[0, 4\), got 4"),
            (narrow, r"its loaded exp_avg must be a tensor of shape \[2, 3\], got \[1, 3\]"),
            (more, "different number of parameter groups"),
        ):
            with pytest.raises(ValueError, match=message):
                optimizer.load_state_dict(bad)
        now = optimizer.state_dict()
        for key, state in saved["state"][0].items():
            assert torch.equal(now["state"][0][key], state)
        assert now["param_groups"][0]["rows"][0].tolist() == [0, 2]
        # The hooks through which loading looks at the state are gone again.
        assert not optimizer._optimizer_load_state_dict_pre_hooks
        assert not optimizer._optimizer_load_state_dict_post_hooks

    def test_masters_are_saved_and_start_from_the_parameter(self, device):
        p = nn.Parameter(torch.randn(4, 3, device=device).bfloat16())
        optimizer = MaskedAdamW([{"params": [p], "rows": [[0, 2]]}], master_weights=True)
        p.grad = torch.randn_like(p)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        q = nn.Parameter(p.detach().clone())
        other = MaskedAdamW([{"params": [q], "rows": [[1]]}], master_weights=True)
        other.load_state_dict(saved)
        q.grad = p.grad
        optimizer.step()
        other.step()
        assert torch.equal(p, q)
        assert torch.equal(other.state[q]["master"], optimizer.state[p]["master"])
        kept = other.state[q]["master"][1].clone()
        other.set_rows(q, [1, 2])
        assert torch.equal(other.state[q]["master"], torch.stack([q[1].float(), kept]))


class TestConversion:
    @EVERY
    def test_from_torch_goes_on_where_torch_is(self, name, device):
        t = Twins(name, device)
        for step in range(5):
            t.set_gradients(step)
            t.dense.step()
        before = [p.detach().clone() for p in t.twins]
        dims = {twin: dim for twin, (_, dim, _) in zip(t.twins, LAYERS.values(), strict=True)}
        rows = {twin: rows for twin, (_, _, rows) in zip(t.twins, LAYERS.values(), strict=True)}
        optimizer = type(t.masked).from_torch(t.dense, rows, dims)
        for step in range(5, 15):
            t.set_gradients(step)
            optimizer.step()
        tuned_by_us = [p.detach().clone() for p in t.twins]
        # The same with torch's own optimizer: the state it had is in nobody else's hands.
        with torch.no_grad():
            for p, start in zip(t.twins, before, strict=True):
                p.copy_(start)
        for step in range(5, 15):
            t.set_gradients(step)
            t.dense.step()
        for got, p, start, (_, dim, rows_) in zip(
            tuned_by_us, t.twins, before, LAYERS.values(), strict=True
        ):
            mask = tuned(p, rows_, dim)
            assert torch.equal(got[~mask], start[~mask])
            assert not mask.any() or (got - p)[mask].abs().max() <= 1e-6 * p.abs().max()

    @EVERY
    def test_to_torch_and_back_keeps_the_bits(self, name, device):
        t = Twins(name, device)
        for step in range(5):
            t.set_gradients(step)
            t.masked.step()
        dense = t.masked.to_torch()
        assert type(dense) is OPTIMIZERS[name][1]
        dims = dict(zip(t.params, (dim for _, dim, _ in LAYERS.values()), strict=True))
        rows = dict(zip(t.params, (rows for _, _, rows in LAYERS.values()), strict=True))
        back = type(t.masked).from_torch(dense, rows, dims)
        for p in t.params:
            for key, state in t.masked.state.get(p, {}).items():
                if key != "step" or "momentum_buffer" not in t.masked.state[p]:
                    assert not rows[p] or torch.equal(back.state[p][key], state), key
        for group, other in zip(t.masked.param_groups, back.param_groups, strict=True):
            assert {**group, "rows": None} == {**other, "rows": None}
        t.set_gradients(5)
        dense.step()

    def test_what_cannot_be_converted_is_refused(self, device):
        p, optimizer = simple(device=device)
        optimizer.step()
        optimizer.set_rows(p, [0, 1])
        with pytest.raises(ValueError, match=r"parameter 0 of group 0: its rows.*from 0 to 1"):
            optimizer.to_torch()
        with pytest.raises(TypeError, match="from_torch takes torch's Adam or AdamW, got SGD"):
            MaskedAdamW.from_torch(torch.optim.SGD([p]))
        with pytest.raises(ValueError, match=r"its rows must lie in \[0, 4\)"):
            MaskedAdamW.from_torch(torch.optim.AdamW([p]), {p: [7]})

    def test_a_parameter_without_rows_named_is_tuned_whole(self, device):
        p = nn.Parameter(torch.randn(4, 3, device=device))
        q = nn.Parameter(torch.tensor(2.0, device=device))
        dense = torch.optim.SGD([p, q], lr=0.1, momentum=0.9)
        p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
        dense.step()
        optimizer = MaskedSGD.from_torch(dense)
        assert optimizer.param_groups[0]["rows"][0].tolist() == [0, 1, 2, 3]
        assert torch.equal(optimizer.state[q]["momentum_buffer"], q.grad.view(1))
        assert torch.equal(optimizer.to_torch().state[q]["momentum_buffer"], q.grad)
