"""Training chosen rows as leaves of their own: their gradients, and what stays as it was."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import IMAGES, Mlp, Residual, Reused, Tied, settled
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformer_models import library

import neusemslice as nss
from neusemslice.graph import Inputs, trace
from neusemslice.optim import MaskedAdamW, MaskedSGD, row_gradients


def groups_of(model, share=0.5, dims=None, alike=False):
    """Random rows of every parameter; along dimension 0 but for those named in `dims`.

    If `alike`, of as many neurons the same ones are drawn: those of a layer's weight and bias.
    """
    generator = torch.Generator().manual_seed(0)
    named = list(model.named_parameters())
    along = [(dims or {}).get(name, 0) for name, _ in named]
    rows = []
    for (_, parameter), dim in zip(named, along, strict=True):
        size = parameter.shape[dim]
        if alike:
            generator.manual_seed(size)
        drawn = torch.randperm(size, generator=generator)[: max(1, int(share * size))]
        rows.append(drawn.sort().values)
    return [{"params": [p for _, p in named], "rows": rows, "neuron_dims": along}]


def chosen(member, whole):
    return whole.index_select(member.neuron_dim, member.rows)


def loss_of(model, x):
    return model(x).square().sum()


def assert_rows_of_dense(model, x, dims=None, loss=loss_of, alike=False, **close):
    """The leaves' gradients are the rows of the whole ones; the block leaves no trace."""
    dense = copy.deepcopy(model)
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    loss(dense, x).backward()
    with row_gradients(model, groups_of(model, dims=dims, alike=alike)) as tuned:
        assert torch.equal(loss(model, x), loss(dense, x))
        loss(model, x).backward()
        of = {id(p): q.grad for p, q in zip(_whole(model, tuned), dense.parameters(), strict=True)}
        for member in tuned.tuned:
            expected = chosen(member, of[id(member.parameter)])
            assert member.leaf.grad.shape == member.leaf.shape == expected.shape
            torch.testing.assert_close(member.leaf.grad, expected, **close)
            assert member.leaf is member.parameter or member.parameter.grad is None
        assert list(model.state_dict()) == list(before)
    assert [type(m) for m in model.modules()] == classes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert [set(m.__dict__) for m in model.modules()] == attributes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def _whole(model, tuned):
    leaves = {id(m.leaf) for m in tuned.tuned if m.leaf is not m.parameter}
    return [p for p in model.parameters() if id(p) not in leaves]


class Parent(nn.Module):
    """Reads a layer's weight itself, beside calling it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 8)
        self.own = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return F.linear(self.fc(x), self.own) + F.linear(x, self.fc.weight)


class Standardised(nn.Linear):
    """A layer with a forward pass of its own."""

    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(), self.bias)


def conv(kind, *args, **kwargs):
    return nn.Sequential(kind(4, 6, *args, **kwargs), nn.Tanh(), kind(6, 4, 3, padding=1))


def turned():
    """Layers with transposed weights."""
    conv1d = library().pytorch_utils.Conv1D
    return nn.Sequential(conv1d(9, 12), nn.Tanh(), conv1d(5, 9))


LAYERS = {
    "linear": (nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5, False)), (5, 12), {}),
    "tokens": (nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)), (5, 3, 12), {}),
    "vector": (nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)), (12,), {}),
    "columns": (nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 5)), (5, 12), {"1.weight": 1}),
    "turned": (turned, (3, 4, 12), {"0.weight": 1, "2.weight": 1}),
    "conv1d": (conv(nn.Conv1d, 3, stride=2, padding=1), (5, 4, 9), {}),
    "conv2d": (conv(nn.Conv2d, (3, 2), 1, (1, 0), (2, 1), 2), (5, 4, 9, 8), {}),
    "conv3d": (conv(nn.Conv3d, 3, padding=1, bias=False), (2, 4, 3, 4, 5), {}),
    "same": (conv(nn.Conv2d, 4, padding="same"), (3, 4, 7, 7), {}),
    "circular": (conv(nn.Conv2d, 3, padding=2, padding_mode="circular"), (3, 4, 7, 7), {}),
    "unbatched": (conv(nn.Conv2d, 3), (4, 7, 7), {}),
    "transposed": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (3, 4, 5, 5),
        {"weight": 1},
    ),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, dilation=2), (3, 4, 5), {"weight": 1}),
    "transposed inputs": (nn.ConvTranspose1d(4, 6, 3), (3, 4, 5), {}),
    "batch norm": (settled(nn.Sequential(nn.BatchNorm2d(4), nn.Tanh()), 4, 5, 5), (3, 4, 5, 5), {}),
    "batch norm 1d": (settled(nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()), 4), (7, 4), {}),
    "batch norm, own statistics": (
        nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh()),
        (3, 4, 5, 5),
        {},
    ),
    "layer norm": (nn.Sequential(nn.LayerNorm(6), nn.Tanh(), nn.RMSNorm(6)), (3, 4, 6), {}),
    "group norm": (nn.Sequential(nn.GroupNorm(2, 6), nn.Tanh()), (3, 6, 5), {}),
    "attention": (nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), (3, 7, 16), {}),
    "parent": (Parent(), (5, 12), {}),
    "own forward": (nn.Sequential(Standardised(12, 6), Standardised(6, 3)), (5, 12), {}),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(12, 6)), (5, 12), {}),
    "reused": (settled(Reused(), 12), (5, 12), {}),
    "tied": (settled(Tied(), 12), (5, 12), {}),
}


def layers(name):
    """Layers, the shape of their input, and the dimension of neurons that are not in rows."""
    made, shape, dims = LAYERS[name]
    return made if isinstance(made, nn.Module) else made(), shape, dims


class TestGradients:
    @pytest.mark.parametrize("name", LAYERS)
    def test_are_the_rows_of_the_dense_one(self, name, device):
        model, shape, dims = layers(name)
        model = copy.deepcopy(model).double().to(device)
        assert_rows_of_dense(model, torch.randn(shape, dtype=torch.float64, device=device), dims)

    @pytest.mark.parametrize(
        "name", ["linear", "tokens", "vector", "turned", "conv2d", "batch norm", "batch norm 1d"]
    )
    def test_where_weight_and_bias_have_the_same_rows(self, name, device):
        model, shape, dims = layers(name)
        model = copy.deepcopy(model).double().to(device)
        x = torch.randn(shape, dtype=torch.float64, device=device)
        assert_rows_of_dense(model, x, dims, alike=True)

    @pytest.mark.parametrize("name", IMAGES)
    def test_of_whole_networks(self, name, device):
        model = settled(IMAGES[name](), 1, 8, 8, device=device).double()
        assert_rows_of_dense(model, torch.randn(5, 1, 8, 8, dtype=torch.float64, device=device))

    @pytest.mark.parametrize("name", ["residual", "depthwise"])
    def test_in_channels_last(self, name, device):
        last = {"memory_format": torch.channels_last}
        model = settled(IMAGES[name](), 1, 8, 8, device=device).double().to(**last)
        x = torch.randn(5, 1, 8, 8, dtype=torch.float64, device=device).contiguous(**last)
        assert_rows_of_dense(model, x)

    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("options", [{}, {"padding_idx": 3, "scale_grad_by_freq": True}])
    def test_of_embeddings(self, dim, options):
        model = nn.Sequential(nn.Embedding(11, 6, **options), nn.Linear(6, 3)).double()
        x = torch.randint(0, 11, (4, 7))
        x[0] = 3
        assert_rows_of_dense(model, x, {"0.weight": dim})

    def test_accumulate_over_steps_and_uses(self):
        model = settled(Residual(), 1, 8, 8).double()
        x = torch.randn(6, 1, 8, 8, dtype=torch.float64)

        def loss(model, x):
            return loss_of(model, x[:2]) + loss_of(model, x[2:])

        assert_rows_of_dense(model, x, loss=loss)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_with_activation_checkpointing(self, reentrant):
        model = settled(Residual(), 1, 8, 8).double()

        def loss(model, x):
            return checkpoint(model, x, use_reentrant=reentrant).square().sum()

        x = torch.randn(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
        assert_rows_of_dense(model, x, loss=loss)

    @pytest.mark.parametrize("name", ["linear", "turned", "conv2d", "transposed", "batch norm"])
    def test_under_autocast(self, name):
        model, shape, dims = layers(name)

        def loss(model, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(x).float().square().sum()

        close = {"rtol": 2e-2, "atol": 2e-2}
        assert_rows_of_dense(copy.deepcopy(model), torch.randn(shape), dims, loss, **close)

    # torch's attention has no second derivative.
    @pytest.mark.parametrize("name", [name for name in LAYERS if name != "attention"])
    def test_of_gradients(self, name):
        """Second derivatives: of a loss that is a gradient's size, by input and weights."""
        model, shape, dims = layers(name)
        model = copy.deepcopy(model).double().eval()
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        dense = copy.deepcopy(model)
        groups = groups_of(model, dims=dims)
        cut = [
            partial(torch.index_select, dim=dim, index=rows)
            for rows, dim in zip(groups[0]["rows"], groups[0]["neuron_dims"], strict=True)
        ]

        def size(model, params, take):
            inputs = [x, *params]
            found = torch.autograd.grad(model(x).pow(3).sum(), inputs, create_graph=True)
            return found[0].square().sum() + sum(
                take(i, g).square().sum() for i, g in enumerate(found[1:])
            )

        params = list(dense.parameters())
        expected = torch.autograd.grad(
            size(dense, params, lambda i, g: cut[i](g)), [x, *params], allow_unused=True
        )
        with row_gradients(model, groups) as tuned:
            leaves = tuned.parameters()
            found = torch.autograd.grad(size(model, leaves, lambda i, g: g), [x, *leaves])
        torch.testing.assert_close(found[0], expected[0])
        for i, (a, b) in enumerate(zip(found[1:], expected[1:], strict=True)):
            torch.testing.assert_close(a, cut[i](b))

    def test_nothing_runs_backward_below_the_lowest_tuned_layer(self):
        model = settled(Mlp(), 12)
        rows = torch.tensor([1, 3])
        with row_gradients(model, [{"params": [model.second.weight], "rows": [rows]}]) as tuned:
            seen = []
            model.second.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            loss_of(model, torch.randn(5, 12)).backward()
            assert not seen[0].requires_grad
            assert [name for name, p in model.named_parameters() if p.requires_grad] == [
                "second.weight_rows"
            ]
            assert tuned.tuned[0].leaf.grad.shape == (2, 16)


class TestFrozenNorms:
    """Batch norms without a tuned row, above one that has some."""

    @staticmethod
    def network(device="cpu", **options):
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, **options), nn.Tanh(), nn.Conv2d(6, 4, 3)]
        model = settled(nn.Sequential(*layers, nn.BatchNorm2d(4)), 3, 7, 7)
        return model.double().to(device)

    @staticmethod
    def groups(model):
        return [{"params": [model[0].weight], "rows": [torch.tensor([1, 4])]}]

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_let_gradients_through(self, layout, device):
        model = self.network(device).to(memory_format=layout)
        x = torch.randn(5, 3, 7, 7, dtype=torch.float64, device=device)
        x = x.contiguous(memory_format=layout).requires_grad_()
        dense = copy.deepcopy(model)
        output = dense(x)
        expected = torch.autograd.grad(output.pow(3).sum(), [x, dense[0].weight])
        with row_gradients(model, self.groups(model)) as tuned:
            own = model(x)
            found = torch.autograd.grad(own.pow(3).sum(), [x, *tuned.parameters()])
        assert torch.equal(own, output)
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1][[1, 4]])

    def test_have_second_derivatives(self):
        model = self.network()
        x = torch.randn(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)
        with row_gradients(model, self.groups(model)):
            assert torch.autograd.gradgradcheck(model, x, fast_mode=True)

    @pytest.mark.parametrize("rows", [[], [0, 5]])
    def test_keep_of_their_input_what_is_tuned(self, rows):
        model = self.network()
        groups = self.groups(model)
        groups.append({"params": [model[1].weight], "rows": [torch.tensor(rows).long()]})
        x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
        read, kept = [], []
        model[1].register_forward_pre_hook(lambda _, args: read.append(args[0]))

        def keep(tensor):
            kept.append(tensor.detach())
            return tensor

        for within in (nullcontext(), row_gradients(model, groups)):
            kept.clear()
            with within, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                model(x)
            whole = read[-1].data_ptr() in [t.data_ptr() for t in kept]
            assert whole == isinstance(within, nullcontext)
        chosen = read[-1][:, rows]
        parts = [t for t in kept if t.shape == chosen.shape and torch.equal(t, chosen)]
        assert len(parts) == bool(rows)

    @pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
    def test_of_other_kinds_are_left_to_torch(self, options):
        model = self.network(**options)
        assert_rows_of_dense(model, torch.randn(5, 3, 7, 7, dtype=torch.float64))

    def test_in_training_mode_follow_the_batch(self):
        model = self.network().train()
        before = model[1].running_mean.clone()
        x = torch.randn(5, 3, 7, 7, dtype=torch.float64)
        dense = copy.deepcopy(model)
        loss_of(dense, x).backward()
        with row_gradients(model, self.groups(model)) as tuned:
            loss_of(model, x).backward()
            (leaf,) = tuned.parameters()
            torch.testing.assert_close(leaf.grad, dense[0].weight.grad[[1, 4]])
        assert not torch.equal(model[1].running_mean, before)
        assert torch.equal(model[1].running_mean, dense[1].running_mean)


class TestTraining:
    @pytest.mark.parametrize(
        "optimizer", [torch.optim.AdamW, torch.optim.SGD, MaskedAdamW, MaskedSGD]
    )
    def test_equals_a_masked_optimizer_on_whole_gradients(self, optimizer):
        model, x = settled(Residual(), 1, 8, 8).double(), torch.randn(9, 1, 8, 8).double()
        peer = copy.deepcopy(model)
        masked = MaskedSGD if "SGD" in optimizer.__name__ else MaskedAdamW
        whole = masked(groups_of(peer), lr=1e-3, weight_decay=0.1)
        frozen = copy.deepcopy(model.state_dict())
        with row_gradients(model, groups_of(model)) as tuned:
            own = optimizer(tuned.groups(), lr=1e-3, weight_decay=0.1)
            for _ in range(5):
                for m, o in ((model, own), (peer, whole)):
                    o.zero_grad()
                    loss_of(m, x).backward()
                    o.step()
            assert sum(p.numel() for p in tuned.parameters()) < 0.6 * sum(
                p.numel() for p in peer.parameters()
            )
        changed = 0
        rows = dict(zip(dict(peer.named_parameters()), groups_of(peer)[0]["rows"], strict=True))
        for name, tensor in peer.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor)
            if name in rows:
                kept = torch.ones(len(tensor), dtype=torch.bool).index_fill(0, rows[name], False)
                assert torch.equal(model.state_dict()[name][kept], frozen[name][kept])
                changed += not torch.equal(tensor, frozen[name])
        assert changed == len(rows)

    def test_of_a_slice(self):
        model = settled(Residual(), 1, 8, 8)
        graph = trace(model, Inputs((torch.randn(2, 1, 8, 8),)))
        masks = {s.name: torch.arange(s.neurons) % 3 == 0 for s in graph.sites}
        tuned_slice = nss.Slice(graph, masks)
        groups = tuned_slice.parameters(model)
        with row_gradients(model, groups) as tuned:
            assert [m.rows.tolist() for m in tuned.tuned] == [r.tolist() for r in groups[0]["rows"]]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert all("rows" not in group for group in tuned.groups())

    def test_rows_are_written_where_they_are_read(self):
        model, x = settled(Mlp(), 12), torch.randn(3, 12)
        with row_gradients(model, groups_of(model)) as tuned:
            with torch.no_grad():
                for leaf in tuned.parameters():
                    leaf.add_(1.0)
            expected = model(x)
            state = model.state_dict()
            whole = copy.deepcopy(settled(Mlp(), 12))
            whole.load_state_dict(state)
            assert torch.equal(whole(x), expected)
            with torch.inference_mode():
                assert torch.equal(model(x), expected)
            model.load_state_dict({name: torch.zeros_like(t) for name, t in state.items()})
            assert not model(x).any()
            for leaf in tuned.parameters():
                leaf.data += 2.0  # what no version counter tells of
            assert model(x).any()
            last = copy.deepcopy(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, last[name])

    def test_a_backward_pass_over_changed_rows_raises(self):
        model = Parent()
        for name in ("fc.weight", "own"):
            parameter = model.get_parameter(name)
            groups = [{"params": [parameter], "rows": [torch.tensor([1, 2])]}]
            with row_gradients(model, groups) as tuned:
                loss = loss_of(model, torch.randn(3, 12, requires_grad=True))
                with torch.no_grad():
                    tuned.parameters()[0].add_(1.0)
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()

    def test_a_whole_parameter_that_is_wanted_as_well_gets_the_rest(self):
        model, x = nn.Linear(4, 3).double(), torch.randn(5, 4).double()
        dense = copy.deepcopy(model)
        loss_of(dense, x).backward()
        with row_gradients(model, [{"params": [model.weight], "rows": [[1]]}]) as tuned:
            whole = tuned.tuned[0].parameter.requires_grad_()
            loss_of(model, x).backward()
            torch.testing.assert_close(tuned.tuned[0].leaf.grad, dense.weight.grad[[1]])
            torch.testing.assert_close(whole.grad[[0, 2]], dense.weight.grad[[0, 2]])
            assert not whole.grad[1].any()

    def test_replaced_parameters_are_read_as_they_are(self):
        model, x = Parent().double(), torch.randn(5, 12).double()
        groups = [{"params": [model.fc.weight], "rows": [[1, 6]]}]
        with row_gradients(model, groups) as tuned:
            (member,) = tuned.tuned
            before = member.parameter.detach().clone()
            leaf = (2 * member.leaf).detach().requires_grad_()
            other = torch.randn_like(before).requires_grad_()
            for replaced in ({"fc.weight_rows": leaf}, {"fc.weight": other}):
                dense = copy.deepcopy(before)
                if "fc.weight" in replaced:
                    dense = other.detach().clone()
                dense[[1, 6]] = replaced.get("fc.weight_rows", member.leaf).detach()
                dense.requires_grad_()
                out = torch.func.functional_call(model, replaced, (x,))
                expected = F.linear(F.linear(x, dense, model.fc.bias), model.own)
                expected = expected + F.linear(x, dense)
                torch.testing.assert_close(out, expected)
                wanted = [*replaced.values(), *([member.leaf] if "fc.weight" in replaced else [])]
                found = torch.autograd.grad(out.pow(2).sum(), wanted)
                (of_dense,) = torch.autograd.grad(expected.pow(2).sum(), dense)
                torch.testing.assert_close(found[-1], of_dense[[1, 6]])
            assert torch.equal(found[0][0], of_dense[0])
        state = {name: torch.ones_like(t) for name, t in model.state_dict().items()}
        with row_gradients(model, groups) as tuned:
            model.load_state_dict(state, assign=True)
            assert torch.equal(tuned.parameters()[0], torch.ones(2, 12).double())
            assert dict(model.named_parameters())["fc.weight"] is tuned.tuned[0].parameter

    def test_groups_keep_their_options_and_whole_parameters(self):
        model = settled(Mlp(), 12)
        groups = [
            {"params": [model.first.weight, model.first.bias], "lr": 0.5, "rows": [[], [2]]},
            {"params": [model.head.weight], "weight_decay": 0.1},
        ]
        with row_gradients(model, groups) as tuned:
            first, second = tuned.groups()
            assert (first["lr"], second["weight_decay"]) == (0.5, 0.1)
            assert [p.shape for p in first["params"]] == [(1,)]
            assert second["params"][0] is model.head.weight
            assert model.head.weight.requires_grad
            assert not model.first.weight.requires_grad

    def test_errors_leave_no_trace_but_what_was_trained(self):
        model = settled(Mlp(), 12)
        before = copy.deepcopy(model.state_dict())

        def broken():
            with row_gradients(model, groups_of(model)) as tuned:
                tuned.parameters()[0].data.add_(1.0)
                raise KeyError

        with pytest.raises(KeyError):
            broken()
        assert type(model.first) is nn.Linear
        assert list(model.state_dict()) == list(before)
        assert all(p.requires_grad for p in model.parameters())
        rows = groups_of(model)[0]["rows"][0]
        moved = model.first.weight - before["first.weight"]
        torch.testing.assert_close(moved[rows], torch.ones_like(moved[rows]))


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "groups", "message"),
        [
            (
                Mlp(),
                [{"params": [nn.Parameter(torch.zeros(3))]}],
                r"a parameter \[3\] with 3 rows",
            ),
            (
                nn.LSTM(3, 4),
                None,
                r"the model \(LSTM\) also keeps a tuned parameter in its .*_flat_w",
            ),
            (
                nn.Sequential(nn.Embedding(9, 4, max_norm=1.0)),
                None,
                "0 is an embedding with max_norm",
            ),
        ],
        ids=["foreign", "lstm", "max_norm"],
    )
    def test_what_would_be_wrong_in_silence(self, model, groups, message):
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=f"row_gradients: .*{message}"):
            row_gradients(model, groups or groups_of(model)).__enter__()
        assert [p.requires_grad for p in model.parameters()] == flags

    def test_wrong_rows(self):
        model = settled(Mlp(), 12)
        for rows, error, message in [
            ([99], ValueError, r"its rows must lie in \[0, 16\), got 99"),
            (torch.zeros(1), TypeError, "its rows must be int64 or bool"),
        ]:
            groups = [{"params": [model.first.weight], "rows": [rows]}]
            with pytest.raises(error, match=f"row_gradients: parameter 0 of group 0: {message}"):
                row_gradients(model, groups).__enter__()
        assert all(p.requires_grad for p in model.parameters())

    def test_a_block_within_a_block(self):
        model = settled(Mlp(), 12)
        with (
            row_gradients(model, groups_of(model)),
            pytest.raises(ValueError, match="first is in such a block already"),
        ):
            row_gradients(model, [{"params": [model.head.bias]}]).__enter__()
        assert type(model.first) is nn.Linear


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_as_one_graph(backend):
    model = nn.Sequential(settled(Residual(), 1, 8, 8), Parent.__new__(Parent))
    model[1].__init__()
    model = nn.Sequential(model[0], nn.Linear(4, 12), model[1]).eval()
    x = torch.randn(5, 1, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(x)
    eager = copy.deepcopy(model)
    results = []
    for m, run in ((eager, eager), (model, compiled)):
        with row_gradients(m, groups_of(m)) as tuned:
            optimizer = torch.optim.SGD(tuned.groups(), lr=1e-3)
            for _ in range(3):
                optimizer.zero_grad()
                run(x).square().mean().backward()
                optimizer.step()
            results.append([leaf.detach().clone() for leaf in tuned.parameters()])
        results[-1].append(run(x).detach())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()
