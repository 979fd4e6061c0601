"""DeepLIFT's contributions: completeness, an oracle, Captum, and what is refused."""

import copy

import models
import pytest
import torch
import torch.nn.functional as F
import transformer_models
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neusemslice import reference
from neusemslice.profiling import deeplift

DELTA = {torch.float32: 1e-4, torch.float64: 1e-9}


class Around(nn.Module):
    """A function of images [N, 4, 6, 6] or tokens [N, 5, 8] between two linear maps."""

    def __init__(self, function, tokens: bool = False) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8) if tokens else nn.Conv2d(4, 4, 3, padding=1)
        self.function = function
        self.after = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)).flatten(1))


def _assert_complete(
    model: nn.Module, x, classes: Tensor, baseline="zeros", modules: tuple[str, ...] = ()
) -> None:
    for dtype, limit in DELTA.items():
        model.to(dtype)
        if isinstance(x, Tensor):
            x = x.to(dtype)
        if isinstance(baseline, Tensor) and baseline.is_floating_point():
            baseline = baseline.to(dtype)
        found = deeplift(model, x, classes, baseline, modules)
        assert found.difference.abs().min() > 0
        for module in (None, *modules):
            assert found.completeness(module).max() < limit, (dtype, module)


def _in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.relu_()
    y[:, 1] *= 0.5
    y[:, 2] = y[:, 0].sigmoid()
    y.add_(1).mul_(y).div_(3)
    return F.silu(y, inplace=True)


def _written(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    y[:, 1:] = x[:, 1:] * x[:, :-1]
    y.index_add_(1, torch.tensor([0, 0, 3, 3]), x.tanh())
    return y


def _masked(x: Tensor) -> Tensor:
    mask = torch.arange(x.shape[-1]) % 2 == 0
    return torch.where(mask, x.exp(), x).masked_fill(~mask.flip(0), 0.5) ** 3


def _layout(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    y = torch.cat([F.gelu(a), b.flip(2)], 1).permute(0, 2, 3, 1)
    y = y.reshape(len(x), -1, 2)[:, ::2].transpose(1, 2).contiguous().unfold(2, 4, 2)
    return torch.stack(y.unbind(1), 2).tanh()


def _statistics(x: Tensor) -> Tensor:
    return torch.cat(
        [x.var((2, 3)), x.std((2, 3)), x.norm(dim=1).flatten(1), x.logsumexp((2, 3))], 1
    )


NAMES = """
    relu gelu silu sigmoid tanh elu selu celu softplus mish leaky_relu relu6 hardtanh hardswish
    hardsigmoid softsign tanhshrink softshrink hardshrink logsigmoid
"""


def _softmax_by_hand(x: Tensor) -> Tensor:
    """Over scores some of which are masked with infinity."""
    later = torch.arange(5) > torch.arange(5).unsqueeze(1)
    scores = (x @ x.mT).masked_fill(later, -torch.inf)
    scores = (scores - scores.amax(-1, keepdim=True)).exp()
    return scores / scores.sum(-1, keepdim=True) @ x


IMAGE_FUNCTIONS = {
    **{
        name: getattr(F, name)
        for name in NAMES.split()
    },
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu module": nn.ReLU(inplace=True),
    "prelu": nn.PReLU(4),
    "glu": lambda x: F.glu(x, 1),
    "method": lambda x: x.sigmoid().sqrt().log().exp().abs().rsqrt().square().sin(),
    "clamp": lambda x: x.clamp(-0.3, 0.5) + x.clamp_min(0) + torch.maximum(x, torch.tensor(0.2)),
    "powers": lambda x: x**2 + x**3 + (x.abs() + 1) ** 0.5 + 2**x + (1 + x.pow(2)).reciprocal(),
    "quotient": lambda x: x / (1 + x.abs()) + 1 / (2 + x.exp()) + (x / 2) / x.mean(1, keepdim=True),
    "roots of zeros": lambda x: x.relu() ** 0.5 + x.relu().sqrt() + F.elu(x).clamp_min(0).pow(0.7),
    "keywords": lambda x: torch.div(input=x, other=1 + x.abs()) + torch.lerp(x, x.exp(), x),
    "product": lambda x: x * x.sigmoid() * x.flip(1) + torch.addcmul(x, x, x),
    "einsum": lambda x: torch.einsum("nchw,ndhw->ncd", x, x.tanh()),
    "softmax": lambda x: x.softmax(1) + F.log_softmax(x * 3, 2) + F.softmin(x, 3),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "max pool, overlapping": nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    "max pool, indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "max pool, others": lambda x: torch.cat(
        [
            F.max_pool1d(x.flatten(2), 3).flatten(1),
            F.max_pool3d(x, (2, 3, 3)).flatten(1),
            F.adaptive_max_pool2d(x, 3).flatten(1),
            F.adaptive_max_pool1d(x.flatten(2), 5).flatten(1),
        ],
        1,
    ),
    "max": lambda x: (
        x.max(1).values + x.amax((1, 2)).unsqueeze(1) - x.min(1).values * x.amin(1)
        + torch.maximum(x[:, 0], x[:, 1]) + torch.minimum(x[:, 2], x[:, 3])
    ),
    "average pool": lambda x: torch.cat(
        [F.avg_pool2d(x, 2).flatten(1), F.adaptive_avg_pool2d(x.relu(), 4).flatten(1)], 1
    ),
    "interpolate": lambda x: F.interpolate(x.relu(), scale_factor=2, mode="bilinear"),
    "pad": lambda x: F.pad(x.tanh(), (1, 2, 0, 1), mode="reflect"),
    "batch norm": nn.BatchNorm2d(4),
    "group norm": nn.GroupNorm(2, 4),
    "instance norm": nn.InstanceNorm2d(4, affine=True),
    "dropout": nn.Dropout(0.5),
    "statistics": _statistics,
    "normalize": lambda x: F.normalize(x, dim=1),
    "in place": _in_place,
    "written": _written,
    "masked": _masked,
    "layout": _layout,
    "detached": lambda x: x.exp() / x.exp().sum(1, keepdim=True).detach() + x.data.relu(),
    "operators": lambda x: torch.ops.aten.relu(x) + torch.ops.aten.tanh.default(x),
}  # fmt: skip

TOKEN_FUNCTIONS = {
    "softmax by hand": _softmax_by_hand,
    "layer norm": nn.LayerNorm(8),
    "layer norm over two": nn.LayerNorm((5, 8)),
    "rms norm": nn.RMSNorm(8),
    "matmul": lambda x: (x @ x.transpose(1, 2)) @ F.gelu(x),
    "baddbmm": lambda x: torch.baddbmm(x @ x.mT, x, x.mT, beta=0.5, alpha=2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.tanh(), x.sigmoid()),
    "attention, causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention, masked": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.arange(5) < torch.tensor([[0], [3], [5], [1], [2]]), scale=0.7
    ),
    "attention, grouped": lambda x: F.scaled_dot_product_attention(
        x.view(-1, 5, 4, 2).transpose(1, 2),
        x[..., :4].view(-1, 5, 2, 2).transpose(1, 2),
        x[..., 4:].view(-1, 5, 2, 2).transpose(1, 2),
        enable_gqa=True,
    ),
}


def _around(function, tokens: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Around(copy.deepcopy(function), tokens)
    x = models.images(6, 5, 8) if tokens else models.images(6, 4, 6, 6)
    model.eval()(x)
    return model, x


@pytest.mark.parametrize("name", IMAGE_FUNCTIONS)
def test_contributions_are_complete_through_functions_of_images(name):
    model, x = _around(IMAGE_FUNCTIONS[name], tokens=False)
    baseline = 0.3 * models.images(1, 4, 6, 6, seed=1)
    _assert_complete(model, x, torch.arange(6) % 3, baseline, ("before", "after"))


@pytest.mark.parametrize("name", TOKEN_FUNCTIONS)
def test_contributions_are_complete_through_functions_of_tokens(name):
    model, x = _around(TOKEN_FUNCTIONS[name], tokens=True)
    _assert_complete(model, x, torch.arange(6) % 3, modules=("before", "after"))


@pytest.mark.parametrize("name", models.IMAGES)
def test_contributions_are_complete_through_networks(name, device):
    torch.manual_seed(0)
    model = models.settled(models.IMAGES[name](), 1, 8, 8, device=device)
    modules = ("head",) if hasattr(model, "head") else ("7", "9")
    _assert_complete(model, models.images(6, 1, 8, 8), torch.arange(6) % 4, modules=modules)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["vit", "swin", "bert", "gpt2", "llama", "qwen3", "phi3"])
def test_contributions_are_complete_through_transformers(name, attention):
    model = transformer_models.transformer(name, attention)
    given = transformer_models.batch(name)
    baseline = "zeros" if name in transformer_models.IMAGES else torch.tensor(3)
    classes = torch.arange(4) % 3
    assert deeplift(model, given, classes, baseline).completeness().max() < 1e-4
    model.double()
    if name in transformer_models.IMAGES:
        given["pixel_values"] = given["pixel_values"].double()
    # These compute norms or softmax in float32 whatever the model's dtype.
    single = name in ("llama", "qwen3", "phi3") or (attention, name) in (
        ("eager", "vit"),
        ("eager", "swin"),
    )
    delta = deeplift(model, given, classes, baseline).completeness().max()
    assert delta < (1e-4 if single else 1e-9)


def test_contributions_are_complete_through_torch_encoder_layers():
    torch.manual_seed(0)
    model = transformer_models.Encoder().eval()
    _assert_complete(model, models.images(4, 6, 5), torch.arange(4) % 3, modules=("head",))


def test_tokens_contribute_through_their_embeddings_and_padding_does_not():
    model = transformer_models.transformer("bert")
    given = transformer_models.batch("bert")
    found = deeplift(model, given, torch.arange(4) % 3, torch.tensor(3))
    padding = given["attention_mask"] == 0
    (words,) = found.inputs
    assert words.shape == (4, 7, 16)
    assert padding.any()
    assert (words[padding] == 0).all()


def _dense(layer: nn.Module, *shape: int) -> tuple[Tensor, Tensor]:
    """A linear map as a matrix, from what it makes of unit vectors."""
    size = torch.Size(shape).numel()
    with torch.no_grad():
        bias = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        rows = layer(torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1)
    return (rows - bias).t(), bias


@pytest.mark.parametrize("kind", ["mlp", "convolutions"])
def test_contributions_equal_the_oracle(kind):
    torch.manual_seed(0)
    if kind == "mlp":
        shapes = [(7,), (9,), (8,)]
        model = nn.Sequential(
            nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)
        )
    else:
        shapes = [(2, 5, 5), (3, 5, 5), (4, 3, 3)]
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
        )
    model.double()
    x = models.images(4, *shapes[0]).double()
    baseline = 0.5 * models.images(1, *shapes[0], seed=1).double()
    layers = [_dense(model[i], *shape) for i, shape in zip((0, 2, 4), shapes, strict=True)]
    classes = torch.tensor([0, 2, 1, 1])
    found = deeplift(model, x, classes, baseline, ("2", "4"))
    for n, target in enumerate(classes.tolist()):
        expected = reference.deeplift_relu(layers, x[n].flatten(), baseline[0].flatten(), target)
        for got, row in zip((found.inputs[0], *found.modules.values()), expected, strict=True):
            # Both sum fewer than a hundred terms of size 1.
            torch.testing.assert_close(got[n].flatten().tolist(), row, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("function", [F.gelu, F.silu, torch.tanh, torch.exp, F.softplus])
@pytest.mark.parametrize("distance", [0.0, 1e-7, 1e-5, 3e-4, 1e-3])
def test_multipliers_of_close_pairs_have_no_noise(function, distance):
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    x = torch.linspace(-5, 5, 101).view(1, -1)
    x = x[x != 0].view(1, -1)
    baseline = x * (1 + distance)
    found = deeplift(Plain(), x, torch.ones(x.shape), baseline)
    a = ((x.double() + baseline.double()) / 2).requires_grad_()
    (slope,) = torch.autograd.grad(function(a).sum(), a)
    expected = slope * (x.double() - baseline.double())
    # Of a quotient's digits half are left at worst, relative to a function of the size of x.
    limit = 4 * torch.finfo(torch.float32).eps ** 0.5 * distance * x.abs().max() * slope.abs().max()
    assert (found.inputs[0] - expected).abs().max() <= limit


class Repeated(nn.Module):
    """Activations called as a module used twice, as a function, and as GELU."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.act = nn.GELU() if kind == "gelu" else nn.ReLU()
        self.other = copy.deepcopy(self.act)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "function":
            return self.head(F.relu(self.second(F.relu(self.first(x)))))
        other = self.act if self.kind == "reused" else self.other
        return self.head(other(self.second(self.act(self.first(x)))))


def _captum(
    model: nn.Module, layer: nn.Module, x: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    method = attr.LayerDeepLift(model, layer)
    found, delta = method.attribute(
        x,
        torch.zeros_like(x),
        target=classes,
        attribute_to_layer_input=True,
        return_convergence_delta=True,
    )
    return (found[0] if isinstance(found, tuple) else found).detach(), delta.abs()


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_captum_agrees_where_it_is_right():
    torch.manual_seed(0)
    for model, layers, shape in (
        (Repeated("modules"), ("second", "head"), (12,)),
        (models.settled(models.lenet(), 1, 8, 8), ("3", "7", "9"), (1, 8, 8)),
    ):
        x, classes = models.images(6, *shape), torch.arange(6) % 4
        found = deeplift(model, x, classes, modules=layers)
        for name in layers:
            expected, _ = _captum(model, model.get_submodule(name), x, classes)
            torch.testing.assert_close(found.modules[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
@pytest.mark.parametrize("kind", ["gelu", "function", "reused"])
def test_complete_where_captum_is_not(kind):
    torch.manual_seed(0)
    model = Repeated(kind)
    x, classes = 3 * models.images(16, 12), torch.arange(16) % 4
    try:
        _, delta = _captum(model, model.first, x, classes)
    except RuntimeError:
        assert kind == "reused"  # it refuses, or answers with a large delta
    else:
        assert delta.max() >= 0.1
    assert deeplift(model, x, classes).completeness().max() < 1e-4


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


REFUSED = {
    "prod": lambda x: x.prod(1),
    "sort": lambda x: x.sort(1).values,
    "topk": lambda x: x.topk(2, 1).values,
    "cumprod": lambda x: torch.cumprod(x, 1),
    "div": lambda x: torch.div(x, x, rounding_mode="floor"),
    "pow": lambda x: x.abs() ** x,
    "einsum": lambda x: torch.einsum("nc,nc,nc->nc", x.mean((2, 3)), x.sum((2, 3)), x.amax((2, 3))),
    "max": lambda x: x / x.max(),
    "item": lambda x: x * x.sum().item(),
    "__float__": lambda x: x * float(x.sum()),
    "numpy": lambda x: x.detach().numpy(),
    "where": lambda x: torch.where(x > 0, x, 2 * x),
    "getitem": lambda x: x[torch.arange(3), x.mean((2, 3)).argmax(1)],
    "to": lambda x: x * (x > 0).to(x.dtype),
    "_TwiceBackward": _Twice.apply,
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "linalg_vector_norm": lambda x: x.norm(p=3, dim=1),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_an_operation_without_a_rule_is_refused_by_name_and_module(operation):
    class Refused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return REFUSED[operation](x)

    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), Refused()), nn.Flatten())
    x = models.images(3, 4, 6, 6)
    message = rf"(?s)deeplift: {operation} in .*(1\.1 \(Refused\)|the model itself|2 \(Flatten\))"
    with pytest.raises(NotImplementedError, match=message):
        deeplift(model, x, torch.tensor([0, 1, 2]))


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.relu(x) * 2


class Elsewhere(nn.Module):
    """A network a part of which runs outside torch's Python functions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.head = nn.Linear(12, 8), nn.Linear(8, 4)
        if kind == "script module":
            self.act = torch.jit.script(nn.Sequential(nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.kind == "script":
            x = scripted(x)
        elif self.kind == "script module":
            x = self.act(x)
        elif self.kind == "vmap":
            x = torch.vmap(torch.relu)(x)
        else:
            x = checkpoint(F.gelu, x, use_reentrant=self.kind == "reentrant")
        return self.head(x)


@pytest.mark.parametrize("kind", ["script", "script module", "vmap", "reentrant", "checkpoint"])
def test_what_runs_elsewhere_is_refused(kind):
    message = "torch.utils.checkpoint" if kind == "checkpoint" else "custom autograd functions"
    with pytest.raises(NotImplementedError, match=message):
        deeplift(Elsewhere(kind), models.images(3, 12), torch.arange(3))


def test_indices_that_differ_between_sample_and_baseline_are_refused():
    model = transformer_models.transformer("gpt2")
    tokens = torch.tensor([[4, 5, 6, 0, 0]])
    # The last token that is not padding answers: another one for this baseline.
    with pytest.raises(NotImplementedError, match=r"deeplift: .*baseline"):
        deeplift(model, {"input_ids": tokens}, torch.tensor([0]), torch.tensor(7))
    kept = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    assert deeplift(model, kept, torch.tensor([0]), torch.tensor(7)).completeness() < 1e-4


def test_what_does_not_fit_is_refused():
    model, x = models.Mlp(), models.images(3, 12)
    classes = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"broadcast to the input \[3, 12\], got \[5\]"):
        deeplift(model, x, classes, torch.zeros(5))
    with pytest.raises(ValueError, match="baseline must be 'zeros' or a tensor, got 'median'"):
        deeplift(model, x, classes, "median")
    with pytest.raises(ValueError, match=r"baseline must be torch\.float32 as the input"):
        deeplift(model, x, classes, torch.zeros(12, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"answers \[3, 4\], to which classes \[2\] do not fit"):
        deeplift(model, x, classes[:2])
    with pytest.raises(ValueError, match=r"classes must lie in \[0, 4\) or be -100, got 4"):
        deeplift(model, x, classes + 2)
    with pytest.raises(ValueError, match="did not call 'last'"):
        deeplift(nn.ModuleDict({"last": model}).last, x, classes, modules=["last"])
    bert = transformer_models.transformer("bert")
    with pytest.raises(ValueError, match="a tensor of token ids for token inputs, got 'zeros'"):
        deeplift(bert, transformer_models.batch("bert"), torch.zeros(4, dtype=torch.int64))
    twice = models.Reused()
    with pytest.raises(NotImplementedError, match="twice is called more than once"):
        deeplift(twice, x, classes, modules=["twice"])


def test_a_model_is_left_as_it_was():
    model = models.settled(models.Residual(), 1, 8, 8)
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    before = copy.deepcopy(model.state_dict())
    x, classes = models.images(4, 1, 8, 8), torch.arange(4)
    kept = x.clone()
    model.stem.train()
    with torch.no_grad():
        first = deeplift(model, x, classes, modules=["head"])
    again = deeplift(model, x, classes, modules=["head"])
    assert torch.equal(first.modules["head"], again.modules["head"])
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert model.stem.training
    assert not model.stem_bn.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert (model.head.weight.grad == 7).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.stem_bn.train()
    with pytest.raises(NotImplementedError, match=r"batch_norm in stem_bn \(BatchNorm2d\)"):
        deeplift(model, x, classes)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]


def test_classes_may_be_weights_or_ignored_and_baselines_one_for_each_sample():
    model = models.Mlp()
    x, classes = models.images(4, 12), torch.tensor([3, -100, 0, 1])
    hard = deeplift(model, x, classes, modules=["head"])
    soft = F.one_hot(classes.clamp_min(0), 4).float() * (classes >= 0).unsqueeze(1)
    assert torch.equal(
        hard.modules["head"], deeplift(model, x, soft, modules=["head"]).modules["head"]
    )
    assert (hard.modules["head"][1] == 0).all()
    baselines = models.images(4, 12, seed=1)
    together = deeplift(model, x, classes, baselines).inputs[0]
    for n in range(4):
        alone = deeplift(model, x[n : n + 1], classes[n : n + 1], baselines[n]).inputs[0]
        torch.testing.assert_close(together[n : n + 1], alone)
    assert (deeplift(model, x, classes, x).inputs[0] == 0).all()


def test_compiled_and_autocast_models():
    model = models.Mlp()
    x, classes = models.images(4, 12), torch.arange(4)
    plain = deeplift(model, x, classes)
    with torch.autocast("cpu", torch.bfloat16):
        rough = deeplift(model, x, classes)
    # Values of size 1 with eight bits, a dozen of them added.
    assert rough.completeness().max() < 12 * 2**-8
    torch.testing.assert_close(rough.inputs[0], plain.inputs[0], rtol=0.1, atol=0.05)
    with torch.inference_mode():
        assert torch.equal(deeplift(model, x.clone(), classes).inputs[0], plain.inputs[0])
