"""MaskedSGD and MaskedAdamW: frozen stays frozen, tuned rows follow torch.optim."""

import copy
import io
import warnings
from collections.abc import Iterator

import pytest
import torch
from helpers import num_threads, same_bits
from torch import Tensor, nn
from torch.optim import lr_scheduler

from neusemslice.optim import MaskedAdamW, MaskedSGD

OPTIMIZERS = {
    "sgd": (MaskedSGD, torch.optim.SGD, {"lr": 0.01}),
    "nesterov": (
        MaskedSGD,
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adamw": (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.05}),
    "amsgrad": (
        MaskedAdamW,
        torch.optim.AdamW,
        {"lr": 1e-3, "betas": (0.8, 0.99), "amsgrad": True, "maximize": True},
    ),
}
BOTH = pytest.mark.parametrize("name", ["nesterov", "amsgrad"])
EVERY = pytest.mark.parametrize("name", list(OPTIMIZERS))
STEPS = 1000

# Shape, neuron dimension and tuned rows of parameters as layers have them.
LAYERS = {
    "linear": ((12, 10), 0, [0, 3, 4, 11]),
    "bias": ((12,), 0, [0, 3, 4, 11]),
    "linear inputs": ((8, 12), 1, [0, 3, 4, 11]),
    "conv channels_last": ((8, 4, 3, 3), 0, [1, 7]),
    "conv inputs channels_last": ((6, 8, 3, 3), 1, [1, 7]),
    "fused qkv": ((24, 8), -2, [0, 1, 8, 9, 16, 17]),
    "embedding": ((20, 6), -1, [2, 5]),
    "norm": ((8,), 0, [1, 7]),
    "nothing": ((5, 4), 0, []),
    "everything": ((3, 4), 0, [0, 1, 2]),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """torch's square root starts threads even for ten numbers, and waits for them a thousand times.

    On a busy machine that makes seconds into minutes; threads are the operators' tests' business.
    """
    with num_threads(1):
        yield


def parameters(device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for name, (shape, _, _) in LAYERS.items():
        values = torch.randn(shape, generator=generator).to(device)
        if "channels_last" in name:
            values = values.to(memory_format=torch.channels_last)
        made.append(nn.Parameter(values))
    return made


def group(params: list[nn.Parameter]) -> dict:
    return {
        "params": params,
        "rows": [rows for _, _, rows in LAYERS.values()],
        "neuron_dims": [dim for _, dim, _ in LAYERS.values()],
    }


def tuned(parameter: Tensor, rows: list[int], dim: int) -> Tensor:
    """True in the tuned rows."""
    mask = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    return mask.index_fill(dim, torch.tensor(rows, dtype=torch.int64, device=mask.device), True)


def gradients(device: torch.device, count: int = 40) -> list[list[Tensor]]:
    """Gradients of `count` steps for all parameters, the same in every run."""
    generator = torch.Generator().manual_seed(8)
    return [
        [torch.randn(shape, generator=generator).to(device) for shape, _, _ in LAYERS.values()]
        for _ in range(count)
    ]


class Twins:
    """The same parameters under a masked optimizer and under torch's own."""

    def __init__(self, name: str, device: torch.device, **options: object) -> None:
        masked, dense, settings = OPTIMIZERS[name]
        settings = {**settings, **options}
        self.before = [p.detach().clone() for p in parameters(device)]
        self.params, self.twins = parameters(device), parameters(device)
        self.masked = masked([group(self.params)], **settings)
        self.dense = dense(self.twins, **settings)
        self.gradients = gradients(device)

    def set_gradients(self, step: int) -> None:
        for p, twin, grad in zip(
            self.params, self.twins, self.gradients[step % len(self.gradients)], strict=True
        ):
            p.grad, twin.grad = grad.clone(), grad.clone()

    def check(self, but: str = "") -> None:
        for (name, (_, dim, rows)), p, twin, before in zip(
            LAYERS.items(), self.params, self.twins, self.before, strict=True
        ):
            if name == but:
                continue
            mask = tuned(p, rows, dim)
            assert torch.equal(p[~mask], before[~mask]), name
            assert not mask.any() or not torch.equal(p[mask], before[mask]), name
            limit = 1e-6 * twin.abs().max()
            assert not mask.any() or (p - twin)[mask].abs().max() <= limit, name
            assert p.stride() == before.stride(), name


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


class TestManners:
    def simple(self, name="amsgrad", device="cpu", rows=(0, 2), **options):
        torch.manual_seed(3)
        p = nn.Parameter(torch.randn(4, 3, device=device))
        p.grad = torch.randn_like(p)
        masked, _, settings = OPTIMIZERS[name]
        groups = [{"params": [p], "rows": [list(rows)], "neuron_dims": [0]}]
        return p, masked(groups, **{**settings, **options})

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
        p, optimizer = self.simple(rows=(), device=device)
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
        q, optimizer = self.simple(device=device)
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
        p, optimizer = self.simple(device=device)
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
        p, optimizer = self.simple(device=device)

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
        _, optimizer = self.simple(device=device)
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
        _, optimizer = self.simple(device=device)
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
        p, optimizer = self.simple(name, device)
        q, compiled = self.simple(name, device)
        step = torch.compile(compiled.step, backend="aot_eager")
        for _ in range(3):
            optimizer.step()
            step()
        assert same_bits(p.detach(), q.detach())
        torch.compiler.reset()


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
        p, optimizer = TestManners().simple(device=device)
        optimizer.step()
        q, other = TestManners().simple(device=device)

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
        p, optimizer = TestManners().simple(device=device)
        optimizer.step()
        saved = optimizer.state_dict()
        optimizer.set_rows(p, [1])
        optimizer.step()
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["rows"][0].tolist() == [0, 2]
        assert optimizer.state[p]["step"].tolist() == [1, 1]

    def test_refuses_what_does_not_fit_and_changes_nothing(self, device):
        _, optimizer = TestManners().simple(device=device)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        twin = nn.Parameter(torch.zeros(4, 3, device=device))
        dense = torch.optim.AdamW([twin])
        dense_state = dense.state_dict()
        sgd_state = TestManners().simple("nesterov", device)[1].state_dict()
        outside = copy.deepcopy(saved)
        outside["param_groups"][0]["rows"] = [[0, 4]]
        narrow = copy.deepcopy(saved)
        narrow["state"][0]["exp_avg"] = narrow["state"][0]["exp_avg"][:1]
        more = copy.deepcopy(saved)
        more["param_groups"] *= 2
        for bad, message in (
            (dense_state, "group 0 of the loaded state has no neuron_dims, rows; it was not saved"),
            (sgd_state, "has no amsgrad, betas, eps; it was not saved by a MaskedAdamW"),
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
