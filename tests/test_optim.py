"""MaskedSGD and MaskedAdamW: frozen stays frozen, tuned rows follow torch.optim."""

from collections.abc import Iterator

import pytest
import torch
from helpers import num_threads, same_bits
from optimizers import BOTH, EVERY, LAYERS, OPTIMIZERS, STEPS, Twins, simple, tuned
from torch import nn
from torch.optim import lr_scheduler


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """torch's square root starts threads even for ten numbers, and waits for them a thousand times.

    On a busy machine that makes seconds into minutes; threads are the operators' tests' business.
    """
    with num_threads(1):
        yield


class TestAgainstTorch:
    @EVERY
    def test_a_thousand_steps(self, name, device):
        t = Twins(name, device)
        for step in range(STEPS):
            t.set_gradients(step)
            t.masked.step()
            t.dense.step()
        t.check()

    @BOTH
    @pytest.mark.parametrize("tensor_lr", [False, True])
    def test_with_a_scheduler(self, name, tensor_lr, device):
        t = Twins(name, device, lr=0.01)
        if tensor_lr:
            t.masked.param_groups[0]["lr"] = torch.tensor(0.01, device=device)
        schedulers = [
            lr_scheduler.OneCycleLR(each, 0.02, total_steps=STEPS) for each in (t.masked, t.dense)
        ]
        for step in range(STEPS):
            t.set_gradients(step)
            t.masked.step()
            t.dense.step()
            for scheduler in schedulers:
                if step + 1 < STEPS:
                    scheduler.step()
        t.check()

    @BOTH
    def test_with_clipping(self, name, device):
        t = Twins(name, device)
        for step in range(STEPS):
            t.set_gradients(step)
            for params in (t.params, t.twins):
                nn.utils.clip_grad_norm_(params, 1.0)
            t.masked.step()
            t.dense.step()
        t.check()

    @BOTH
    def test_with_accumulation(self, name, device):
        t = Twins(name, device)
        for step in range(STEPS):
            t.accumulate_gradients(step)
            t.masked.step()
            t.dense.step()
        t.check()

    @BOTH
    def test_with_grad_scaler(self, name, device):
        t = Twins(name, device)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=100)
        skipped = 0
        for step in range(STEPS):
            t.set_gradients(step)
            scaler.scale(torch.zeros((), device=device))  # what sets the scaler up
            for p in t.params:
                p.grad *= scaler.get_scale()
            if step % 250 == 3:
                t.params[0].grad[1, 1] = torch.inf  # any gradient, a frozen row's too
            before = [p.detach().clone() for p in t.params]
            scaler.step(t.masked)
            scaler.update()
            if step % 250 == 3:
                skipped += 1
                assert all(torch.equal(p, b) for p, b in zip(t.params, before, strict=True))
            else:
                t.dense.step()
        assert skipped == 4
        assert t.masked.state[t.params[0]]["step"].tolist() == [STEPS - skipped] * 4
        t.check()

    def test_unscaling_before_clipping(self, device):
        t = Twins("amsgrad", device)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
        for step in range(20):
            t.set_gradients(step)
            scaler.scale(torch.zeros((), device=device))
            for p in t.params:
                p.grad *= scaler.get_scale()
            scaler.unscale_(t.masked)
            for params in (t.params, t.twins):
                nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(t.masked)
            scaler.update()
            t.dense.step()
        t.check()

    @BOTH
    def test_mask_changed_mid_run(self, name, device):
        t = Twins(name, device)
        late = Twins(name, device)  # its torch optimizer starts when new rows join
        old, new = LAYERS["linear"][2], [0, 1, 4, 7]
        for step in range(STEPS):
            if step == STEPS // 2:
                half = t.params[0].detach().clone()
                t.masked.set_rows(t.params[0], new)
            t.set_gradients(step)
            late.set_gradients(step)
            t.masked.step()
            t.dense.step()
            if step >= STEPS // 2:
                late.dense.step()
        p, limit = t.params[0], 1e-6 * t.twins[0].abs().max()
        for row in range(12):
            if row in old and row in new:
                assert (p[row] - t.twins[0][row]).abs().max() <= limit, row
            elif row in new:
                assert (p[row] - late.twins[0][row]).abs().max() <= limit, row
            else:
                assert torch.equal(p[row], half[row]), row
        t.check(but="linear")

    @BOTH
    def test_real_model_with_accumulation(self, name, device):
        masked, dense, settings = OPTIMIZERS[name]

        def build() -> nn.Sequential:
            torch.manual_seed(9)
            layers = (nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))
            return nn.Sequential(*layers).to(device, memory_format=torch.channels_last)

        model, twin, origin = build(), build(), build()
        conv, linear = model[0], model[3]
        params = [conv.weight, conv.bias, linear.weight]
        rows = [torch.tensor([False, True, False, False, True, True], device=device)] * 2
        inputs = rows[0].repeat_interleave(9)  # the linear inputs that the tuned channels feed
        optimizer = masked(
            [{"params": params, "rows": [*rows, inputs], "neuron_dims": [0, 0, 1]}], **settings
        )
        peers = [twin[0].weight, twin[0].bias, twin[3].weight]
        other = dense(peers, **settings)
        for _ in range(30):
            optimizer.zero_grad()
            for _ in range(2):
                x = torch.randn(8, 2, 5, 5, device=device)
                y = torch.randint(0, 4, (8,), device=device)
                (nn.functional.cross_entropy(model(x), y) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for p, peer in zip(params, peers, strict=True):
                peer.grad = p.grad.clone()
            optimizer.step()
            other.step()
        assert torch.equal(linear.bias, origin[3].bias)
        for p, peer, start, mask, dim in zip(
            params,
            peers,
            [origin[0].weight, origin[0].bias, origin[3].weight],
            [*rows, inputs],
            [0, 0, 1],
            strict=True,
        ):
            index, frozen = mask.nonzero().flatten(), (~mask).nonzero().flatten()
            assert torch.equal(p.index_select(dim, frozen), start.index_select(dim, frozen))
            gap = (p - peer).index_select(dim, index).abs().max()
            assert gap <= 1e-6 * peer.abs().max()

    @EVERY
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_other_dtypes(self, name, dtype, device):
        masked, dense, settings = OPTIMIZERS[name]
        start = torch.randn(6, 4, device=device).to(dtype)
        p = nn.Parameter(start.clone())
        twin = nn.Parameter(start.double().clone())
        optimizer = masked([{"params": [p], "rows": [[1, 4]], "neuron_dims": [0]}], **settings)
        other = dense([twin], **settings)
        for _ in range(10):
            p.grad = torch.randn(6, 4, device=device).to(dtype)
            twin.grad = p.grad.double()
            optimizer.step()
            other.step()
        rest = [0, 2, 3, 5]
        assert torch.equal(p[rest], start[rest])
        # Each step rounds the parameter once.
        limit = 10 * torch.finfo(dtype).eps * twin.abs().max()
        assert (p.double() - twin)[[1, 4]].abs().max() <= limit
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for key, state in optimizer.state[p].items():
            assert state.dtype == (torch.float32 if key == "step" else wide)

    @EVERY
    def test_groups_without_rows_are_tuned_whole(self, name, device):
        masked, dense, settings = OPTIMIZERS[name]
        start = [torch.randn(5, 3, device=device), torch.tensor(1.5, device=device)]
        params = [nn.Parameter(s.clone()) for s in start]
        twins = [nn.Parameter(s.clone()) for s in start]
        optimizer, other = masked(params, **settings), dense(twins, **settings)
        for _ in range(20):
            for p, twin in zip(params, twins, strict=True):
                p.grad = torch.randn_like(p)
                twin.grad = p.grad
            optimizer.step()
            other.step()
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)

    @EVERY
    def test_masters_follow_float32(self, name, device):
        masked, dense, settings = OPTIMIZERS[name]
        start = torch.randn(6, 4, device=device).bfloat16()
        p, twin = nn.Parameter(start.clone()), nn.Parameter(start.float())
        groups = [{"params": [p], "rows": [[1, 4]]}]
        optimizer, other = (
            masked(groups, **settings, master_weights=True),
            dense([twin], **settings),
        )
        for _ in range(STEPS // 10):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.float()
            optimizer.step()
            other.step()
        rest = [0, 2, 3, 5]
        assert torch.equal(p[rest], start[rest])
        master = optimizer.state[p]["master"]
        assert torch.equal(p[[1, 4]], master.bfloat16())
        assert (master - twin[[1, 4]]).abs().max() <= 1e-6 * twin.abs().max()
        assert "master" not in masked([twin], master_weights=True).state[twin]


class TestClipping:
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
    @pytest.mark.parametrize("max_norm", [0.5, 1e6])
    def test_by_the_tuned_rows_alone(self, norm_type, max_norm, device):
        t = Twins("nesterov", device)
        t.set_gradients(0)
        masks = [
            tuned(p, rows, dim) for p, (_, dim, rows) in zip(t.params, LAYERS.values(), strict=True)
        ]
        for twin, mask in zip(t.twins, masks, strict=True):
            twin.grad[~mask] = 0
        full = [p.grad.clone() for p in t.params]
        expected = nn.utils.clip_grad_norm_(t.twins, max_norm, norm_type)
        norm = t.masked.clip_grad_norm_(max_norm, norm_type)
        torch.testing.assert_close(norm, expected)
        for p, twin, mask, before in zip(t.params, t.twins, masks, full, strict=True):
            torch.testing.assert_close(p.grad[mask], twin.grad[mask])
            assert torch.equal(p.grad[~mask], before[~mask])

    def test_what_it_cannot_clip_by(self, device):
        p, optimizer = simple(device=device)
        p.grad[1] = torch.nan  # a frozen row
        assert optimizer.clip_grad_norm_(1.0).isfinite()
        p.grad[2] = torch.inf
        before = p.grad.clone()
        with pytest.raises(RuntimeError, match=r"MaskedAdamW: parameter 0 of group 0.*got inf"):
            optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
        assert same_bits(p.grad, before)
        p.grad[2] = torch.finfo(p.grad.dtype).max  # finite, but not the sum of its squares
        with pytest.raises(RuntimeError, match=r"MaskedAdamW: the norm of the gradients.*got inf"):
            optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
        p.grad = None
        assert optimizer.clip_grad_norm_(1.0) == 0
