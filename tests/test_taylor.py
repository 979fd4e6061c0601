"""The metric "taylor" against a sweep over samples and neurons one by one, and what it promises."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import same_bits
from models import IMAGES, Mlp, Residual, Tokens, images, loader, settled
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformer_models import Attending, transformer
from transformer_models import batch as text

import neusemslice as nss
import neusemslice.profiling.profiler as profiler_module
from neusemslice.ops import CONTRIBUTION_STATISTICS, ClassStats
from neusemslice.profiling import Profiler

VECTORS = loader(shape=(12,))
PICTURES = loader()


def cross_entropy(output, labels):
    logits = output.logits if hasattr(output, "logits") else output
    return F.cross_entropy(logits.flatten(0, -2), labels if labels.ndim > 1 else labels.flatten())


def one_by_one(model, graph, batches, num_classes, loss=None):
    """Contributions of every site in float64: one sample, one neuron and one position at a time.

    A batch is (keyword arguments or an input, labels). Per-token labels make each token a sample.
    """
    model = copy.deepcopy(model).double()
    sums = {s.name: torch.zeros(2, num_classes, s.neurons).double() for s in graph.sites}
    count = torch.zeros(num_classes, dtype=torch.float64)
    seen: dict = {}
    for site in graph.sites:
        module = model.get_submodule(site.readers[0].module)
        module.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]}))
    for inputs, labels in batches:
        for n in range(len(labels)):
            given, label = inputs, labels[n : n + 1]
            if isinstance(inputs, dict):
                given = {k: v[n : n + 1] for k, v in inputs.items()}
                output = model(**given)
            else:
                output = model(inputs[n : n + 1].double())
            soft = labels.is_floating_point()
            total = (loss or cross_entropy)(output, label.double() if soft else label)
            parts = label[0] if soft else F.one_hot(label.flatten(), num_classes)
            parts = parts.double().reshape(-1, num_classes)  # of each token, or of the sample
            count += parts.sum(0)
            mask = given.get("attention_mask") if isinstance(inputs, dict) else None
            readers = [model.get_submodule(site.readers[0].module) for site in graph.sites]
            gradients = torch.autograd.grad(total * len(parts), [seen[r] for r in readers])
            for site, reader, gradient in zip(graph.sites, readers, gradients, strict=True):
                place = site.readers[0]
                product = (seen[reader].detach() * gradient).movedim(place.dim, -1)
                product = product.reshape(-1, product.shape[-1])
                if mask is not None and product.shape[0] == mask.numel():
                    product = product[mask[0].bool()]
                if len(parts) == 1:
                    product = product.mean(0, keepdim=True)
                for c in range(site.neurons):
                    first = place.start + c * place.repeat
                    q = product[:, first : first + place.repeat].mean(1)
                    sums[site.name][0, :, c] += (parts * q.unsqueeze(1)).sum(0)
                    sums[site.name][1, :, c] += (parts * q.abs().unsqueeze(1)).sum(0)
    return {name: total / count.clamp_min(1e-300).view(-1, 1) for name, total in sums.items()}


def assert_matches(profile, expected, rtol):
    """Equal up to `rtol` of the site's largest contribution."""
    assert expected
    for name, (mean, mean_abs) in expected.items():
        got, scale = profile.contributions[name], float(mean_abs.max())
        assert scale > 0, name
        assert (got.mean.cpu() - mean).abs().max() <= rtol * scale, name
        assert (got.mean_abs.cpu() - mean_abs).abs().max() <= rtol * scale, name


def assert_same_bits(a, b):
    for name, tensor in a.state_dict().items():
        assert same_bits(tensor, b.state_dict()[name]), name


# float32's rounding of 6e-8, through the some hundred terms of a few layers' sums.
ROUNDING = 1e-5


class TestOneByOne:
    @pytest.mark.parametrize("name", IMAGES)
    def test_convolutions(self, name, device):
        model = settled(IMAGES[name](), 1, 8, 8, device=device)
        profile = nss.profile(model, PICTURES, ("taylor",))
        assert_matches(profile, one_by_one(model.cpu(), profile.graph, PICTURES, 4), ROUNDING)

    def test_linear_layers_in_float64(self):
        model = settled(Mlp(), 12).double()
        data = [(x.double(), y) for x, y in VECTORS]
        profile = nss.profile(model, data, ("taylor",))
        # The planes of mean_abs are float32.
        assert_matches(profile, one_by_one(model, profile.graph, data, 4), 2e-7)

    @pytest.mark.parametrize("name", ["bert", "llama", "vit"])
    def test_transformers(self, name):
        model, labels = transformer(name), torch.tensor([0, 2, 1, 1])
        inputs = text(name)
        profile = nss.profile(model, [inputs | {"labels": labels}], ("taylor",))
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        assert_matches(
            profile, one_by_one(model, profile.graph, [(wide, labels)], 3), 10 * ROUNDING
        )

    def test_soft_labels(self):
        model = settled(Residual(), 1, 8, 8)
        data = [(x, torch.rand(len(x), 4) + 0.1) for x, _ in PICTURES]
        profile = nss.profile(model, data, ("taylor",))
        assert_matches(profile, one_by_one(model, profile.graph, data, 4), ROUNDING)

    def test_token_labels(self):
        model = nn.Sequential(
            nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)
        )
        data = [(torch.randn(4, 5, 6), torch.randint(0, 3, (4, 5))) for _ in range(2)]
        profile = nss.profile(model, data, ("taylor",))

        def loss(output, labels):  # a mean, as cross_entropy above of one sample
            return F.cross_entropy(output.flatten(0, 1), labels.flatten())

        expected = one_by_one(model, profile.graph, data, 3, loss)
        assert_matches(profile, expected, ROUNDING)

    def test_one_sample_does_not_enter_anothers_contribution(self):
        model = settled(Residual(), 1, 8, 8)
        whole = nss.profile(model, PICTURES, ("taylor",))
        alone = [(x[n : n + 1], y[n : n + 1]) for x, y in PICTURES for n in range(len(y))]
        for name, stats in nss.profile(model, alone, ("taylor",)).contributions.items():
            torch.testing.assert_close(
                stats.mean_abs, whole.contributions[name].mean_abs, rtol=1e-4, atol=1e-8
            )


class TestDtypes:
    @pytest.mark.parametrize("form", ["autocast", "bf16"])
    @pytest.mark.parametrize("kind", ["images", "vectors"])
    def test_half_precision_is_close(self, form, kind):
        model = settled(Residual(), 1, 8, 8) if kind == "images" else settled(Mlp(), 12)
        data = PICTURES if kind == "images" else VECTORS
        expected = nss.profile(model, data, ("taylor",))
        if form == "bf16":
            model, data = model.bfloat16(), [(x.bfloat16(), y) for x, y in data]
            profile = nss.profile(model, data, ("taylor",))
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                profile = nss.profile(model, data, ("taylor",))
        for name, stats in profile.contributions.items():
            wanted = expected.contributions[name].mean_abs
            # A unit of bfloat16 is 2^-8 of a value, and a gradient has passed some ten roundings.
            assert (stats.mean_abs - wanted).abs().max() <= 0.1 * wanted.max(), name

    def test_frozen_parameters(self):
        model = settled(Residual(), 1, 8, 8)
        expected = nss.profile(model, PICTURES, ("taylor",))
        model.requires_grad_(False)
        assert_same_bits(nss.profile(model, PICTURES, ("taylor",)), expected)
        assert not any(p.requires_grad for p in model.parameters())

    def test_frozen_parameters_and_a_layer_that_is_written_into(self):
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 5, 3),
            nn.Flatten(),
            nn.Linear(80, 4),
        ).requires_grad_(False)
        profile = nss.profile(model, PICTURES, ("taylor",))
        assert_matches(profile, one_by_one_of_frozen(model, profile.graph), ROUNDING)

    def test_inputs_that_require_gradients_get_none(self):
        model = settled(Mlp(), 12)
        data = [(x.clone().requires_grad_(), y) for x, y in VECTORS]
        assert_same_bits(
            nss.profile(model, data, ("taylor",)), nss.profile(model, VECTORS, ("taylor",))
        )
        assert all(x.grad is None for x, _ in data)


def one_by_one_of_frozen(model, graph):
    trainable = copy.deepcopy(model).requires_grad_(True)
    trainable[1].inplace = False
    return one_by_one(trainable, graph, PICTURES, 4)


class Checkpointed(nn.Module):
    """A stem, two blocks that keep nothing, and a head."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Linear(12, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)
        )
        self.last = nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(F.relu(self.last(x)))


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("metrics", [("taylor",), ("avg", "var", "taylor")])
    def test_counts_once_what_runs_twice(self, metrics, reentrant, monkeypatch):
        model = settled(Checkpointed(None), 12)
        expected = nss.profile(model, VECTORS, metrics)
        # A reentrant checkpoint hides from a trace what couples the neurons within it.
        monkeypatch.setattr(profiler_module, "trace", lambda *_: expected.graph)
        model.reentrant = reentrant
        assert_same_bits(nss.profile(model, VECTORS, metrics), expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_in_ones_own_loop_with_trained_parameters(self, reentrant, monkeypatch):
        model = settled(Checkpointed(None), 12)
        expected = nss.profile(model, VECTORS)
        monkeypatch.setattr(profiler_module, "trace", lambda *_: expected.graph)
        model.reentrant = reentrant
        with Profiler(model, VECTORS[0][0], ("avg", "taylor")) as profiler:
            for x, y in VECTORS:
                with profiler.batch(y):
                    F.cross_entropy(model(x), y, reduction="sum").backward()
        assert_same_bits(profiler.profile, expected)
        assert all(p.grad is not None for p in model.parameters())

    def test_transformers_own_checkpointing(self):
        model, labels = transformer("bert", hidden_dropout_prob=0.0), torch.tensor([0, 2, 1, 1])
        model.config.attention_probs_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        inputs, profiles = text("bert"), []
        model.train()  # transformers checkpoints in training only
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable()
            profiler = Profiler(model, inputs, ("avg", "taylor"))
            with profiler.batch(labels, inputs["attention_mask"]):
                logits = model(**inputs).logits
                F.cross_entropy(logits, labels, reduction="sum").backward()
            profiles.append(profiler.profile)
        assert_same_bits(*profiles)

    def test_a_checkpoint_keeps_no_activation(self):
        kept = []
        for reentrant in (None, False, True):
            model = settled(Checkpointed(reentrant), 12)
            profiler = Profiler(model, VECTORS[0][0], ("taylor",))
            with profiler.batch(VECTORS[0][1]):
                output = model(VECTORS[0][0])
                gc.collect()
                kept.append(
                    sum(type(o) is torch.Tensor and o.shape == (7, 16) for o in gc.get_objects())
                )
                output.sum().backward()
        assert kept[1] == kept[2] == 0


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append((func._schema.name, args))
        return func(*args, **(kwargs or {}))


class TestCost:
    def test_no_gradient_of_a_weight_is_computed(self):
        model = settled(Residual(), 1, 8, 8)
        with Operators() as operators:
            nss.profile(model, PICTURES[:1], ("taylor",))
        backward = [args for name, args in operators.ran if name == "aten::convolution_backward"]
        # Of six convolutions, the first needs no gradient of its input either.
        assert len(backward) == 5
        assert all(args[-1] == [True, False, False] for args in backward)
        norms = [args for name, args in operators.ran if "batch_norm_backward" in name]
        assert all(args[-1] == [True, False, False] for args in norms)

    def test_a_product_less_per_linear_layer(self):
        counts = []
        for loss in ("profile", "training"):
            model = settled(Mlp(), 12)
            profiler = Profiler(model, VECTORS[0][0], ("taylor",))
            x, y = VECTORS[0]
            with Operators() as operators, profiler.batch(y):
                if loss == "profile":
                    model.requires_grad_(False)
                F.cross_entropy(model(x), y, reduction="sum").backward()
            counts.append(sum(name in ("aten::mm", "aten::addmm") for name, _ in operators.ran))
        assert counts == [3 + 2, 3 + 2 + 3]

    def test_a_gradient_is_released_when_it_was_used(self, monkeypatch):
        """Alive at once: what one layer's backward pass needs, not every site's gradient."""
        layers = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(12)]
        model = nn.Sequential(*layers, nn.Linear(32, 4))
        alive, real = [], profiler_module.contribution_

        def counting(state, x, g, *rest, **options):
            real(state, x, g, *rest, **options)
            alive.append(
                sum(type(o) is torch.Tensor and o.shape == (7, 32) for o in gc.get_objects())
            )

        monkeypatch.setattr(profiler_module, "contribution_", counting)
        nss.profile(model, [(torch.randn(7, 32), torch.arange(7) % 4)], ("taylor",))
        assert len(alive) == 12
        assert alive == sorted(alive, reverse=True)
        assert alive[0] - alive[-1] >= 10

    def test_nothing_is_alive_behind_a_batch_without_its_backward_pass(self):
        model = settled(Mlp(), 12)
        profiler = Profiler(model, VECTORS[0][0], ("taylor",))

        def tensors():
            gc.collect()
            return [o for o in gc.get_objects() if type(o) is torch.Tensor]

        # Apart from those of earlier tests, which may go meanwhile.
        others = {id(o): weakref.ref(o) for o in tensors()}
        alive = []
        for _ in range(3):
            refused = pytest.raises(ValueError, match="needs a backward pass")
            with refused, profiler.batch(VECTORS[0][1]):
                model(VECTORS[0][0])
            alive.append(sum(others.get(id(o), str)() is not o for o in tensors()))
        assert alive[-1] == alive[0]


class Exploding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise OSError("stop")


class TestPromises:
    @pytest.mark.parametrize("frozen", [False, True])
    def test_after_an_error_within_the_backward_pass(self, frozen):
        model = settled(Mlp(), 12).train()
        model.second.eval().requires_grad_(not frozen)
        for p in model.parameters():
            p.grad = torch.full_like(p, 7)
        handle = model.second.register_forward_hook(lambda m, a, out: Exploding.apply(out))
        with pytest.raises(OSError, match="stop"):
            nss.profile(model, VECTORS, ("avg", "taylor"))
        handle.remove()
        assert all((p.grad == 7).all() for p in model.parameters())
        assert [p.requires_grad for p in model.second.parameters()] == [not frozen] * 2
        assert all(p.requires_grad for p in model.first.parameters())
        assert [m.training for m in model.modules()] == [True, True, False, True]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_a_second_backward_pass_is_refused(self):
        model = settled(Mlp(), 12)
        x, y = VECTORS[0]
        profiler = Profiler(model, x, ("taylor",))
        with profiler.batch(y):
            loss = model(x).sum()
            loss.backward(retain_graph=True)
            with pytest.raises(ValueError, match="can have one backward pass"):
                loss.backward()

    def test_an_activation_that_was_written_into_is_refused(self):
        class Writing(Mlp):
            def forward(self, x):
                x = F.relu(self.first(x))
                y = self.second(x)
                x.mul_(2)
                return self.head(F.relu(y))

        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            nss.profile(settled(Writing(), 12).requires_grad_(False), VECTORS, ("taylor",))

    def test_a_part_that_runs_without_gradients_is_named(self):
        class Half(Mlp):
            enabled = True

            def forward(self, x):
                with torch.set_grad_enabled(self.enabled):
                    x = F.relu(self.second(F.relu(self.first(x))))
                return self.head(x)

        model, (x, y) = settled(Half(), 12), VECTORS[0]
        profiler = Profiler(model, x, ("taylor",))
        model.enabled = False
        refused = pytest.raises(
            ValueError, match=r"needs gradients, but head, second ran without \(to"
        )
        with refused, profiler.batch(y):
            model(x).sum().backward()

    def test_a_loss_that_depends_on_nothing_is_refused(self):
        with pytest.raises(ValueError, match="a loss that depends on what the sites see"):
            nss.profile(
                settled(Mlp(), 12), VECTORS, ("taylor",), loss=lambda out, y: out.detach().sum()
            )

    def test_products_that_are_not_finite_are_counted(self):
        model = settled(Mlp(), 12)

        def loss(output, labels):
            return (output * torch.tensor([torch.inf, 1.0, 1.0, 1.0])).sum()

        with pytest.warns(RuntimeWarning, match="NaN or infinite values"):
            profile = nss.profile(model, VECTORS, ("taylor",), loss=loss)
        assert all(s.nonfinite.sum() > 0 for s in profile.contributions.values())
        assert all(s.mean.isfinite().all() for s in profile.contributions.values())

    def test_states_hold_what_the_operator_fills(self):
        profile = nss.profile(settled(Mlp(), 12), VECTORS, ("taylor",))
        for stats in profile.contributions.values():
            empty = ClassStats.empty(4, stats.neurons, CONTRIBUTION_STATISTICS)
            assert stats.tensors().keys() == empty.tensors().keys()
            assert torch.equal(stats.count, stats.positions)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _afterwards(self):
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize(
        ("kind", "backend"),
        [
            *((kind, "aot_eager") for kind in ("mlp", "residual", "tokens", "attention")),
            pytest.param("tokens", "inductor", marks=pytest.mark.slow),
        ],
    )
    def test_one_graph(self, kind, backend):
        shape: tuple[int, ...]
        model, shape = {
            "mlp": (Mlp(), (12,)),
            "residual": (Residual(), (1, 8, 8)),
            "tokens": (Tokens(), (5, 12)),
            "attention": (Attending("by head"), (5, 10)),
        }[kind]
        model = settled(model, *shape)
        data = [(images(6, *shape, seed=i), torch.arange(6) % 3) for i in range(2)]
        expected = nss.profile(model, data, ("avg", "taylor"))
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        profile = nss.profile(compiled, data, ("avg", "taylor"))
        for name, stats in profile.contributions.items():
            wanted = expected.contributions[name]
            scale = float(wanted.mean_abs.max())
            assert torch.equal(stats.count, wanted.count)
            assert (stats.mean - wanted.mean).abs().max() <= ROUNDING * scale, name
            assert (stats.mean_abs - wanted.mean_abs).abs().max() <= ROUNDING * scale, name
