"""What the profiler promises besides numbers: errors that name it, no traces, no waiting."""

import copy
import gc
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Mlp, Residual, Tokens, images, loader, settled
from torch import nn

import neusemslice as nss
from neusemslice import Profiler
from neusemslice.profiling import profiler as profiler_module
from neusemslice.profiling import sweep

BATCHES = loader(24, shape=(12,))
MODEL = settled(Mlp(), 12)


def assert_close(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[name], rtol=1e-5, atol=1e-6)


class TestSplits:
    @given(
        st.lists(st.integers(1, 9), min_size=1, max_size=8),
        st.randoms(use_true_random=False),
        st.integers(1, 4),
    )
    @settings(max_examples=15)
    def test_any_batches_on_any_shards_give_the_same(self, sizes, random, shards):
        total = sum(sizes)
        x = images(total, 12)
        y = torch.tensor([random.choice([0, 1, 2, 3, -100]) for _ in range(total)])
        whole = Profiler(MODEL, x[:2], ("avg", "var"))
        with whole.batch(y):
            MODEL(x)
        parts = [Profiler(MODEL, x[:2], ("avg", "var")) for _ in range(shards)]
        for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
            with random.choice(parts).batch(ys):
                MODEL(xs)
        merged = parts[0].profile
        for part in parts[1:]:
            merged.merge(part.profile)
        assert_close(merged, whole.profile)


class TestErrors:
    @pytest.mark.parametrize("metrics", [("avg",), ("avg", "taylor")])
    def test_a_label_beyond_the_classes_in_a_later_batch(self, metrics):
        batches = [*BATCHES[:2], (images(3, 12), torch.tensor([0, 7, 1]))]
        with pytest.raises(
            ValueError, match=r"profile: batch 2: labels must lie in \[0, 4\).*got 7 at index 1"
        ):
            nss.profile(MODEL, batches, metrics)

    def test_batches_are_counted_from_where_a_sweep_began(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sweep, "CHECKPOINT_SECONDS", 0.0)
        bad = (images(3, 12), torch.tensor([0, 7, 1]))
        for _ in range(2):
            with pytest.raises(ValueError, match="profile: batch 4: labels must lie"):
                nss.profile(MODEL, [*BATCHES, bad], checkpoint=tmp_path / "checkpoint")

    def test_a_model_without_logits(self):
        class NoLogits(Mlp):
            def forward(self, x):
                return {"answer": super().forward(x)}

        with pytest.raises(TypeError, match=r"the model must return logits .* got dict"):
            nss.profile(NoLogits(), BATCHES)

    def test_a_batch_that_does_not_run_the_model(self):
        profiler = Profiler(MODEL, images(2, 12))
        with (
            pytest.raises(RuntimeError, match="no site was seen within the batch's block"),
            profiler.batch([0, 1]),
        ):
            pass

    def test_masks_and_weights_name_the_batch(self):
        profiler = Profiler(MODEL, images(2, 12))
        with profiler.batch([0, 1]):
            MODEL(images(2, 12))
        with (
            pytest.raises(ValueError, match=r"batch 1: mask must be bool \[N, T\] .*got \[2\]"),
            profiler.batch([0, 1], mask=torch.ones(2, dtype=torch.bool)),
        ):
            pass
        with (
            pytest.raises(ValueError, match=r"batch 2: weights must have shape \[2\], got \[3\]"),
            profiler.batch([0, 1], weights=torch.ones(3)),
        ):
            pass


class TestLabelsOnAGpu:
    """There a label out of range is passed over, because looking at it would be a wait."""

    @pytest.fixture(autouse=True)
    def _as_on_a_gpu(self, monkeypatch):
        real = profiler_module.class_order

        def lenient(labels, num_classes):
            known = (labels >= 0) & (labels < num_classes)
            return real(labels.where(known, -100), num_classes)

        monkeypatch.setattr(profiler_module, "class_order", lenient)

    BAD = (images(4, 12), torch.tensor([0, 7, -100, -1]))
    MESSAGE = r"profile: 2 labels lay outside \[0, 4\) and were not -100"

    def test_are_missed_at_the_end(self):
        model = settled(Mlp(), 12).train()
        with pytest.raises(ValueError, match=self.MESSAGE):
            nss.profile(model, [BATCHES[0], self.BAD, BATCHES[1]])
        assert model.training
        assert not any(m._forward_pre_hooks for m in model.modules())

    def test_do_not_enter_a_checkpoint(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sweep, "CHECKPOINT_SECONDS", 0.0)
        batches = iter([BATCHES[0], self.BAD, BATCHES[1]])
        with pytest.raises(ValueError, match=self.MESSAGE):
            nss.profile(MODEL, batches, checkpoint=tmp_path / "checkpoint")
        assert next(batches, None) is not None

    def test_are_missed_on_leaving_the_profiler(self):
        with (
            pytest.raises(ValueError, match=self.MESSAGE),
            Profiler(MODEL, images(2, 12)) as profiler,
            profiler.batch(self.BAD[1]),
        ):
            MODEL(self.BAD[0])

    @pytest.mark.filterwarnings("error")
    def test_others_are_not(self):
        x, y = images(4, 12), torch.tensor([0, -100, -100, 3])
        assert nss.profile(MODEL, [(x, y)]).samples.tolist() == [1, 0, 0, 1]


class TestNonfinite:
    def broken(self):
        model = settled(Residual(), 1, 8, 8)
        with torch.no_grad():
            model.inner.bias[2] = torch.nan
        return model

    def test_sites_and_counts_are_named(self):
        batches = loader(24)
        with pytest.warns(RuntimeWarning, match="NaN or infinite .* statistics of inner") as found:
            profile = nss.profile(self.broken(), batches, ("avg",))
        counts = profile.nonfinite()
        assert counts["inner"] == 24 * 4 * 4
        assert "inner (384)" in str(found[0].message)
        assert "stem" not in counts

    @pytest.mark.filterwarnings("ignore")
    def test_other_neurons_keep_their_statistics(self):
        batches, bad = loader(24), self.broken()
        good = copy.deepcopy(bad)
        with torch.no_grad():
            good.inner.bias[2] = 0
        stats = nss.profile(bad, batches, ("avg",)).activations["inner"].tensors()
        expected = nss.profile(good, batches, ("avg",)).activations["inner"].tensors()
        others = torch.arange(10) != 2
        for name in ("mean", "m2", "mean_abs", "max", "active"):
            assert torch.equal(stats[name][:, others], expected[name][:, others])
            assert (stats[name][:, 2].nan_to_num(neginf=0) == 0).all()

    def test_in_a_loop_of_ones_own(self):
        model, batches = self.broken(), loader(24)
        profiler = Profiler(model, batches[0][0][:2])
        profiler.__enter__()
        for x, y in batches:
            with profiler.batch(y):
                model(x)
        with pytest.warns(RuntimeWarning, match="NaN or infinite"):
            profiler.__exit__(None, None, None)

    @pytest.mark.filterwarnings("error")
    def test_finite_values_say_nothing(self):
        assert nss.profile(MODEL, BATCHES).nonfinite() == {}


class Failing(Mlp):
    """Fails in its last layer when told to."""

    failing = False

    def forward(self, x):
        answer = super().forward(x)
        if self.failing:
            raise OSError("stop")
        return answer


@pytest.mark.parametrize(
    ("culprit", "metrics"),
    [
        *itertools.product(["model", "loader", "trace"], [("avg",), ("avg", "taylor")]),
        ("loss", ("taylor",)),
    ],
)
def test_the_model_is_left_alone_after_an_error(culprit, metrics):
    model = settled(Failing(), 12).train()
    model.first.eval()
    model.second.requires_grad_(False)
    calls = itertools.count()

    def batches():
        yield from BATCHES[:2]
        if culprit == "loader":
            raise OSError("stop")
        model.failing = culprit == "model"
        yield BATCHES[2]

    def loss(output, labels):
        if culprit == "loss" and next(calls) == 1:
            raise OSError("stop")
        return nn.functional.cross_entropy(output, labels, reduction="sum")

    model.failing = culprit == "trace"
    with pytest.raises(OSError, match="stop"):
        nss.profile(model, batches(), metrics, loss=loss)
    assert [m.training for m in model.modules()] == [True, False, True, True]
    flags = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert flags == {"second.weight", "second.bias"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _afterwards(self):
        yield
        torch.compiler.reset()

    def test_hooks_reach_code_that_a_wrapper_compiled_before(self):
        model, (x, y) = settled(Mlp(), 12), BATCHES[0]
        compiled = torch.compile(model, backend="aot_eager")
        compiled(x)
        with Profiler(model, x[:2]) as profiler:
            for _ in range(2):
                with profiler.batch(y):
                    compiled(x)
        expected = nss.profile(model, [(x, y), (x, y)], ("avg",))
        assert_close(profiler.profile, expected)

    def test_a_wrapper_is_profiled_by_the_names_of_the_model_in_it(self):
        model = settled(Mlp(), 12)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(BATCHES[0][0])
        profile, expected = (nss.profile(m, BATCHES, ("avg", "var")) for m in (compiled, model))
        assert profile.graph == expected.graph
        assert_close(profile, expected)

    def test_gradients_of_a_compiled_model(self):
        model = settled(Mlp(), 12)
        compiled = torch.compile(model, backend="aot_eager")
        assert_close(*(nss.profile(m, BATCHES, ("taylor",)) for m in (compiled, model)))

    def test_a_compiled_part_is_traced_as_it_was_written(self):
        model = nn.Sequential(settled(Mlp(), 12))
        expected = nss.profile(model, BATCHES)
        model[0].compile(backend="aot_eager")
        model(BATCHES[0][0])
        profile = nss.profile(model, BATCHES)
        assert profile.graph == expected.graph
        assert_close(profile, expected)


class TestDevices:
    """A model on the meta device has no values, so that asking for one is an error."""

    @pytest.fixture(params=["labels", "token labels", "soft labels"])
    def batch(self, request):
        x, mask = images(6, 5, 12), torch.arange(5).expand(6, 5) < 4
        labels = {
            "labels": torch.arange(6) % 4,
            "token labels": torch.arange(30).view(6, 5) % 4,
            "soft labels": torch.rand(6, 4),
        }
        return x, labels[request.param], mask, torch.rand(6)

    @pytest.fixture
    def model(self, monkeypatch):
        """Without values, to be observed with the graph of one that has them."""
        model = settled(Tokens(), 5, 12)
        graph = Profiler(model, images(2, 5, 12), sites=["inner"]).graph
        monkeypatch.setattr(profiler_module, "trace", lambda model, inputs: graph)
        return model.to("meta")

    @pytest.mark.parametrize("place", ["cpu", "meta"])
    @pytest.mark.parametrize("mask_place", ["cpu", "meta"])
    def test_a_batch_does_not_wait(self, model, batch, place, mask_place):
        x, labels, mask, weights = batch
        profiler = Profiler(model, x, ("avg", "taylor"))
        with profiler.batch(labels.to(place), mask.to(mask_place), weights.to(place)):
            model(x.to("meta")).sum().backward()

    def test_waiting_would_be_noticed(self, model):
        with pytest.raises(RuntimeError, match="meta"):
            Profiler(model, images(2, 5, 12)).check_labels()

    def test_a_sweep_waits_at_its_end_only(self, model, monkeypatch):
        waits = []
        monkeypatch.setattr(Profiler, "conclude", lambda profiler: waits.append(profiler.batches))
        x, y = images(6, 5, 12), torch.arange(6) % 4
        nss.profile(model, [(x, y)] * 3)
        assert waits == [3]


@pytest.mark.parametrize("metrics", [("avg",), ("avg", "var", "taylor")])
def test_memory_does_not_grow_with_the_number_of_batches(metrics):
    model, alive = settled(Residual(), 1, 8, 8), []

    def batches():
        for number in range(12):
            gc.collect()
            alive.append(
                [o.numel() for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
            )
            yield images(8, 1, 8, 8, seed=number), torch.arange(8) % 4

    nss.profile(model, batches(), metrics)
    assert {(len(sizes), sum(sizes)) for sizes in alive[2:]} == {(len(alive[2]), sum(alive[2]))}
