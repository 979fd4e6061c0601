"""The metric "deeplift" in a profile, the mean of metrics, and scores of one's own."""

import pytest
import torch
import torch.nn.functional as F
from helpers import here
from models import IMAGES, Mlp, Tokens, images, loader, settled
from test_cli import TASK
from torch import nn
from transformer_models import batches as text_batches
from transformer_models import transformer
from typer.testing import CliRunner

import neusemslice as nss
from neusemslice import reference
from neusemslice.cli import app
from neusemslice.profiling import METRICS, Profile, Profiler, deeplift, sweep
from neusemslice.slicing import SCORES, shares

pytestmark = pytest.mark.usefixtures("device")

BATCHES = loader()
VECTORS = loader(40, shape=(12,))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return settled(Mlp(), 12)


def assert_same_bits(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor.cpu(), b.state_dict()[name].cpu()), name


class TestDeepLift:
    @pytest.mark.pretended
    @pytest.mark.parametrize("name", IMAGES)
    def test_equals_all_contributions_at_once(self, name):
        torch.manual_seed(0)
        model = settled(IMAGES[name](), 1, 8, 8)
        profile = nss.profile(model, BATCHES, ("deeplift",))
        x, y = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
        modules = dict.fromkeys(site.readers[0].module for site in profile.graph.sites)
        found = deeplift(model, here(x), y, modules=[*modules]).modules
        assert profile.graph.sites
        for site in profile.graph.sites:
            reader = site.readers[0]
            part = reader.take(found[reader.module], site.neurons).movedim(reader.neuron_dim, 1)
            pooled = part.reshape(len(y), site.neurons, -1).mean(2).cpu()
            expected = reference.class_stats(pooled, y, 4)
            got = profile.lifts[site.name]
            scale = expected.mean_abs.max()
            torch.testing.assert_close(got.mean.cpu(), expected.mean, rtol=1e-4, atol=1e-5 * scale)
            torch.testing.assert_close(
                got.mean_abs.cpu().double(), expected.mean_abs, rtol=1e-4, atol=1e-5 * scale
            )

    def test_equals_the_oracle_of_single_neurons_and_samples(self):
        model = mlp().double()
        layers = [(m.weight.detach().cpu(), m.bias.detach().cpu()) for m in model.children()]
        x, y = images(9, 12).double(), torch.arange(9) % 4
        baseline = x.mean(0)
        profile = nss.profile(
            model, [(x[:4], y[:4]), (x[4:], y[4:])], ("deeplift",), baseline="mean"
        )
        found = [
            reference.deeplift_relu(layers, sample, baseline, int(label))
            for sample, label in zip(x, y, strict=True)
        ]
        for depth, site in enumerate(("first", "second"), 1):
            each = torch.tensor([c[depth] for c in found], dtype=torch.float64)
            for k in range(4):
                own = each[y == k]
                got = profile.lifts[site]
                torch.testing.assert_close(got.mean[k].cpu(), own.mean(0), rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(
                    got.mean_abs[k].cpu().double(), own.abs().mean(0), rtol=1e-6, atol=1e-9
                )

    def test_of_a_layer_sums_to_the_mean_difference_of_the_class(self):
        model = mlp()
        profile = nss.profile(model, VECTORS, ("deeplift",))
        x, y = (torch.cat(parts) for parts in zip(*VECTORS, strict=True))
        with torch.no_grad():
            difference = (model(here(x)) - model(here(torch.zeros(1, 12)))).cpu()[
                torch.arange(40), y
            ]
        for lifts in profile.lifts.values():
            expected = torch.stack([difference[y == k].mean() for k in range(4)]).double()
            torch.testing.assert_close(lifts.mean.sum(1).cpu(), expected, rtol=1e-4, atol=1e-5)

    def test_beside_taylor_changes_neither(self):
        both = nss.profile(mlp(), VECTORS, ("avg", "taylor", "deeplift"))
        taylor = nss.profile(mlp(), VECTORS, ("avg", "taylor"))
        lifted = nss.profile(mlp(), VECTORS, ("avg", "deeplift"))
        for name, tensor in both.state_dict().items():
            source = lifted if name.startswith("lifts") else taylor
            assert torch.equal(tensor, source.state_dict()[name]), name

    @pytest.mark.pretended
    def test_heads_and_padding(self):
        model = transformer("bert")
        batches = text_batches("bert")
        profile = nss.profile(model, batches, ("deeplift",), baseline=torch.tensor(3))
        heads = [site for site in profile.graph.sites if site.readers[0].repeat > 1]
        assert heads
        for site in (heads[0], *profile.graph.sites[-2:]):
            reader, rows, labels = site.readers[0], [], []
            for batch in batches:
                given = here({k: v for k, v in batch.items() if k != "labels"})
                found = deeplift(
                    model, given, batch["labels"], torch.tensor(3), [reader.module]
                ).modules[reader.module]
                part = reader.take(found, site.neurons).movedim(reader.neuron_dim, -1).cpu()
                for n, row in enumerate(part):
                    if row.ndim > 1:
                        row = row[batch["attention_mask"][n].bool()].flatten(0, -2).mean(0)
                    rows.append(row)
                labels.append(batch["labels"])
            expected = reference.class_stats(torch.stack(rows), torch.cat(labels), 3)
            got = profile.lifts[site.name]
            torch.testing.assert_close(got.mean.cpu(), expected.mean, rtol=1e-4, atol=1e-6)

    def test_tokens_with_labels_of_their_own(self):
        class PerToken(Tokens):
            def forward(self, x):
                h = self.embed(x)
                return self.head(h + self.outer(F.gelu(self.inner(self.norm(h)))))

        torch.manual_seed(0)
        model = here(PerToken().eval())
        x, y = images(3, 5, 12), torch.arange(15).view(3, 5) % 4
        profile = nss.profile(model, [(x, y)], ("deeplift",), sites=["inner"])
        found = deeplift(model, here(x), y, modules=["outer"]).modules["outer"].cpu()
        expected = reference.class_stats(found.flatten(0, 1), y.flatten(), 4)
        got = profile.lifts["inner"].mean.cpu()
        torch.testing.assert_close(got, expected.mean, rtol=1e-5, atol=1e-7)

    def test_soft_labels_of_one_class_are_hard_ones(self):
        soft = [(x, F.one_hot(y, 4).float()) for x, y in VECTORS]
        a, b = (nss.profile(mlp(), data, ("deeplift",)) for data in (VECTORS, soft))
        for name, tensor in a.state_dict().items():
            if name.startswith("lifts") and "nonfinite" not in name:
                torch.testing.assert_close(tensor, b.state_dict()[name])

    def test_in_a_loop_of_ones_own(self):
        model = mlp()
        with Profiler(model, images(2, 12), ("deeplift",)) as profiler:
            for x, y in VECTORS:
                with profiler.batch(y), torch.inference_mode():
                    model(here(x))
            with (
                pytest.raises(RuntimeError, match="needs the model itself to be called"),
                profiler.batch([0]),
            ):
                model.second(model.first(here(images(1, 12))).relu())
        assert not any(m._forward_pre_hooks for m in model.modules())
        got = profiler.profile.lifts["first"]
        expected = nss.profile(model, VECTORS, ("deeplift",)).lifts["first"]
        assert torch.equal(got.mean, expected.mean)

    def test_compiled(self):
        compiled = torch.compile(mlp(), backend="eager")
        assert_same_bits(
            nss.profile(compiled, VECTORS, ("deeplift",)),
            nss.profile(mlp(), VECTORS, ("deeplift",)),
        )

    def test_a_model_that_writes_into_its_input(self):
        class Writes(Mlp):
            def forward(self, x):
                return super().forward(x.sub_(0.5))

        model = settled(Writes(), 12)
        x, y = VECTORS[0]
        expected = deeplift(model, here(x), y, modules=["second"]).modules["second"].cpu()
        profiler = Profiler(model, images(2, 12), ("deeplift",))
        with profiler.batch(y):
            model(here(x).clone())
        got = profiler.profile.lifts["first"].mean[0].float().cpu()
        torch.testing.assert_close(got, expected[y == 0].mean(0))

    def test_what_has_no_rule_is_refused(self):
        class Sorted(Mlp):
            def forward(self, x):
                return super().forward(x).sort(1).values

        with pytest.raises(NotImplementedError, match=r"deeplift: sort in the model itself"):
            nss.profile(here(Sorted()), VECTORS, ("deeplift",))

    def test_survives_files_merging_and_interruption(self, tmp_path, monkeypatch):
        metrics = ("taylor", "deeplift")
        whole = nss.profile(mlp(), VECTORS, metrics)
        read = Profile.load(whole.save(tmp_path / "profile"))
        assert_same_bits(read, whole)
        assert read.baseline == "zeros"
        halves = [nss.profile(mlp(), part, metrics) for part in (VECTORS[:3], VECTORS[3:])]
        merged = halves[0] + halves[1]
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-6, atol=1e-7)

        def interrupted():
            yield from VECTORS[:2]
            raise KeyboardInterrupt

        monkeypatch.setattr(sweep, "CHECKPOINT_SECONDS", 0.0)
        path = tmp_path / "checkpoint"
        with pytest.raises(KeyboardInterrupt):
            nss.profile(mlp(), interrupted(), metrics, checkpoint=path)
        assert_same_bits(nss.profile(mlp(), VECTORS, metrics, checkpoint=path), whole)


class TestBaselines:
    @pytest.mark.pretended
    def test_the_mean_is_that_of_all_samples(self):
        mean = torch.cat([x for x, _ in VECTORS]).double().mean(0).float()
        a = nss.profile(mlp(), VECTORS, ("deeplift",), baseline="mean")
        b = nss.profile(mlp(), VECTORS, ("deeplift",), baseline=mean)
        assert (a.baseline, b.baseline[:7]) == ("mean", "tensor ")
        assert_same_bits(a, b)

    def test_profiles_of_different_baselines_are_not_merged(self):
        a = nss.profile(mlp(), VECTORS, ("deeplift",))
        b = nss.profile(mlp(), VECTORS, ("deeplift",), baseline=torch.ones(12))
        with pytest.raises(ValueError, match="differ in their baselines: zeros and tensor"):
            a.merge(b)
        assert nss.profile(mlp(), VECTORS, ("avg",)).baseline == ""

    def test_refusals(self):
        model = mlp()
        with pytest.raises(ValueError, match="loader that can be gone through twice"):
            nss.profile(model, iter(VECTORS), ("deeplift",), baseline="mean")
        with pytest.raises(ValueError, match="baseline must be 'zeros', 'mean' or a tensor"):
            nss.profile(model, VECTORS, ("deeplift",), baseline="ones")
        ragged = [(images(2, 4), [0, 1]), (images(2, 5), [0, 1])]
        with pytest.raises(ValueError, match=r"one has shape \[4\] and another \[5\]"):
            nss.profile(model, ragged, ("deeplift",), baseline="mean")
        bert = transformer("bert")
        with pytest.raises(ValueError, match="tokens have no mean"):
            nss.profile(bert, text_batches("bert"), ("deeplift",), baseline="mean")


class TestScores:
    def profile(self, **options):
        return nss.profile(mlp(), VECTORS, METRICS, **options)

    def test_deeplift_and_ens_by_hand(self):
        profile = self.profile()
        mean_abs = profile.lifts["first"].mean_abs
        assert torch.equal(SCORES["deeplift"](profile, "first").cpu(), mean_abs.double().cpu())
        each = [shares(SCORES[metric](profile, "first")) for metric in METRICS]
        ens = SCORES["ens"](profile, "first")
        torch.testing.assert_close(ens, sum(each) / 4, rtol=1e-15, atol=0)
        torch.testing.assert_close(ens.sum(1).cpu(), torch.ones(4, dtype=torch.float64))
        slicing = nss.slice(profile, metric="ens", threshold=0.8)
        assert torch.equal(slicing.shares["first"], shares(ens).cpu())
        assert slicing.metric == "ens"

    def test_a_function_of_ones_own(self, tmp_path):
        def firing(profile, site):
            return profile.activations[site].active

        slicing = nss.slice(self.profile(), metric=firing, threshold=0.7)
        active = slicing.profile.activations["first"].active.double().cpu()
        assert torch.equal(slicing.shares["first"], shares(active))
        read = nss.SemanticSlicing.load(slicing.save(tmp_path / "slice"))
        assert read.metric == "firing"
        assert read.critical_slice() == slicing.critical_slice()
        assert torch.equal(read.shares["first"], slicing.shares["first"])

    @pytest.mark.parametrize(
        ("score", "message"),
        [
            (
                lambda p, s: p.activations[s].mean - 1,
                "must be finite and not negative, at site first",
            ),
            (lambda p, s: torch.full((4, 16), torch.nan), "must be finite and not negative"),
            (lambda p, s: torch.ones(16), r"must give \[4, 16\] for site first, got \[16\]"),
        ],
    )
    def test_a_function_that_gives_no_scores(self, score, message):
        with pytest.raises(ValueError, match=f"slice: the score <lambda> {message}"):
            nss.slice(self.profile(), metric=score)
        with pytest.raises(TypeError, match=r"must give a tensor \[4, 16\].* got list"):
            nss.slice(self.profile(), metric=lambda p, s: [1])

    @pytest.mark.parametrize("metric", [*METRICS, "ens"])
    def test_a_site_of_zeros_has_no_shares_and_no_nan(self, metric):
        model = mlp()
        with torch.no_grad():
            model.second.weight.zero_()
            model.second.bias.zero_()
        slicing = nss.slice(nss.profile(model, VECTORS, METRICS), metric)
        assert (slicing.shares["second"] == 0).all()
        assert not slicing.critical["second"].any()
        assert all(p.isfinite().all() for p in slicing.shares.values())


class TestOverall:
    def test_of_activations_is_a_profile_of_one_class(self):
        profile = nss.profile(mlp(), VECTORS, ("avg", "var"))
        one = [(x, torch.zeros_like(y)) for x, y in VECTORS]
        expected = nss.profile(mlp(), one, ("avg", "var"), num_classes=1)
        overall = profile.overall()
        assert overall.class_names == ("all",)
        for name, tensor in overall.state_dict().items():
            torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("metric", [*METRICS, "ens"])
    def test_every_score_has_a_class_agnostic_one(self, metric):
        profile = nss.profile(mlp(), VECTORS, METRICS)
        overall = profile.overall()
        score = SCORES[metric](overall, "first")
        assert score.shape == (1, 16)
        if metric in ("taylor", "deeplift"):
            each = SCORES[metric](profile, "first")
            expected = (profile.samples[:, None] * each).sum(0) / profile.samples.sum()
            torch.testing.assert_close(score[0], expected, rtol=1e-6, atol=1e-9)
        assert len(nss.slice(overall, metric).critical_slice()) > 0

    def test_of_no_sample(self):
        empty = Profile.empty(nss.profile(mlp(), VECTORS).graph, "abc", METRICS).overall()
        assert all(
            (tensor == 0).all() or name.endswith("max")
            for name, tensor in empty.state_dict().items()
        )


def test_the_command_line_knows_them(tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)

    def run(command):
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.output
        return result.output

    run("profile task.py --metric deeplift --metric var --baseline mean")
    profile = Profile.load(tmp_path / "run" / "profile.safetensors")
    assert profile.metrics == ("deeplift", "var")
    assert profile.baseline == "mean"
    assert "by ens" in run("slice --metric ens")
    result = CliRunner().invoke(app, ["profile", "task.py", "--baseline", "ones"])
    assert result.exit_code == 1
