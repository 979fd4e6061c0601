"""Re-adaptation tunes the critical rows it chose, and not a bit else."""

import copy
from importlib import import_module

import pytest
import torch
from helpers import here
from models import IMAGES, Mlp, loader, settled
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import neusemslice as nss
from neusemslice.graph import Inputs
from neusemslice.maintain import Delta, recalibrate, score
from neusemslice.maintain.drift import neuron_drift
from neusemslice.maintain.holdout import held_out

pytestmark = pytest.mark.usefixtures("device")

BATCHES = loader(96)
SHIFTED = [(x * 1.5 + 0.7, y) for x, y in BATCHES]


def made(name="residual", threshold=0.9):
    model = settled(IMAGES[name](), 1, 8, 8)
    return model, nss.slice(nss.profile(model, BATCHES), threshold=threshold)


def tuned_rows(result):
    """Dimension and rows of each tuned tensor; the output layer is tuned whole."""
    found = {}
    owners = {id(p): n for n, p in result.model.named_parameters()}
    for group in result.tuned.parameters(result.model):
        for p, dim, rows in zip(group["params"], group["neuron_dims"], group["rows"], strict=True):
            found[owners[id(p)]] = (dim, rows)
    for name in result.tuned.graph.outputs:
        for key, p in result.model.get_submodule(name).named_parameters():
            found[f"{name}.{key}"] = (0, here(torch.arange(len(p))))
    return found


def stem_statistics(model, batches=SHIFTED):
    """Mean and unbiased variance of each batch before the first norm, float64 ``[C]``."""
    outputs = [model.stem(here(x)).double().transpose(0, 1).flatten(1) for x, _ in batches]
    return [(z.mean(1), z.var(1)) for z in outputs]


@pytest.mark.pretended
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("recalibrate", [False, True])
def test_everything_outside_the_tuned_rows_keeps_its_bits(name, recalibrate):
    model, slicing = made(name)
    before = copy.deepcopy(model.state_dict())
    options = {"epochs": 2, "weight_decay": 0.1, "validation": None, "recalibrate": recalibrate}
    result = nss.readapt(model, slicing, SHIFTED, budget=0.4, **options)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"the given model's {key} changed"
    after = result.model.state_dict()
    assert after.keys() == before.keys()
    tuned = tuned_rows(result)
    statistics = {key for key, _ in model.named_buffers()} if recalibrate else set()
    moved = 0
    for key in after.keys() - statistics:
        value, expected = after[key], before[key]
        if key in tuned:
            dim, rows = tuned[key]
            moved += int((value != expected).any())
            expected = expected.index_copy(dim, rows, value.index_select(dim, rows))
        assert torch.equal(value, expected), key
    assert moved == len(tuned) > 0


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("recalibrate", [False, True])
def test_the_delta_turns_the_given_model_into_the_result_and_back(name, recalibrate, tmp_path):
    model, slicing = made(name)
    result = nss.readapt(
        model, slicing, SHIFTED, 0.4, epochs=2, recalibrate=recalibrate, validation=None
    )
    delta = Delta.load(result.delta.save(tmp_path / "delta.safetensors"))
    before = copy.deepcopy(model.state_dict())
    delta.apply(model)
    for key, value in result.model.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    delta.remove(model)
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key
    tuned = tuned_rows(result)
    statistics = {key for key, _ in model.named_buffers()}
    for key, rows in delta.rows.items():
        if key in tuned:
            assert set(rows.tolist()) <= set(tuned[key][1].tolist())
        else:
            assert recalibrate
            assert key in statistics


def test_the_delta_is_as_large_as_the_tuned_rows():
    model, slicing = made()
    for budget in (0.1, 0.3, 0.6):
        result = nss.readapt(model, slicing, SHIFTED, budget, epochs=1, validation=None)
        rows = sum(len(rows) for _, rows in tuned_rows(result).values())
        assert result.delta.nbytes <= 4 * result.report.tuned_parameters + 8 * rows


def test_it_fits_the_new_samples():
    model, slicing = made("lenet")
    result = nss.readapt(
        model, slicing, SHIFTED, 0.5, epochs=25, lr=1e-2, validation=None, old=BATCHES
    )
    assert score(result.model, SHIFTED, "test").loss < 0.8 * score(model, SHIFTED, "test").loss
    report = result.report
    assert report.training.losses[-1] < report.training.losses[0]
    assert report.old_before == score(model, BATCHES, "test")
    assert report.old_after == score(result.model, BATCHES, "test")
    assert report.new_before is None
    assert report.new_after is None
    assert report.best_epoch == 25


def test_the_budget_is_kept_and_used():
    model, slicing = made()
    neurons = slicing.profile.graph.neurons
    critical = slicing.critical_slice()
    for budget in (0.1, 0.25, 1.0):
        result = nss.readapt(model, slicing, SHIFTED, budget=budget, epochs=1)
        assert len(result.tuned) == min(int(budget * neurons), len(critical))
        assert len(result.tuned - critical) == 0
        assert result.report.tuned_neurons == len(result.tuned) / neurons


def test_half_is_tuned_where_the_movement_begins_and_half_everywhere():
    model, slicing = made()
    some = [(torch.where((y == 1).view(-1, 1, 1, 1), 3 * x, x), y) for x, y in BATCHES]
    budget = 0.3
    result = nss.readapt(model, slicing, some, budget=budget, epochs=1, validation=None)
    drift = torch.tensor(result.report.drift)
    moved = drift >= 0.5 * drift.mean()
    assert 0 < int(moved.sum()) < len(drift)
    drifts = [result.report.drift[c] for c in result.report.components]
    assert drifts == sorted(drifts, reverse=True)

    def heaviest(candidates, weight, count):
        return set(sorted(candidates, key=lambda i: -float(weight[i]))[:count])

    allowed = int(budget * slicing.profile.graph.neurons)
    room, first, left = allowed // 2, {}, {}
    for site in slicing.profile.graph.sites:
        component, weight = slicing.components[site.name], slicing.importance(site.name)
        critical = set((component >= 0).nonzero().flatten().tolist())
        wanted = {i for i in critical if moved[component[i]]}
        first[site.name] = heaviest(wanted, weight, room)
        left[site.name] = critical - first[site.name]
        room -= len(first[site.name])
    assert room == 0
    rest = allowed - allowed // 2
    total = sum(map(len, left.values()))
    for site in slicing.profile.graph.sites:
        tuned = set(result.tuned.mask(site.name).nonzero().flatten().tolist())
        assert first[site.name] <= tuned
        more = tuned - first[site.name]
        assert abs(len(more) - rest * len(left[site.name]) / total) < 1
        component = slicing.components[site.name]
        weight = slicing.importance(site.name) * drift[component]
        assert more == heaviest(left[site.name], weight, len(more))
    assert len(result.tuned) == allowed


def test_drift_is_the_distance_of_normal_distributions():
    """Recomputed from single activations in float64."""
    model, slicing = made("lenet")
    new = nss.profile(model, SHIFTED, ("avg",))
    found = neuron_drift(slicing, new)
    site = slicing.profile.graph.sites[0]
    reader = model[2]  # the pool after the first activation; its reader is the next convolution
    pooled = {}
    for name, batches in (("old", BATCHES), ("new", SHIFTED)):
        with torch.no_grad():
            a = [reader(model[1](model[0](here(x)))).double().mean((2, 3)) for x, _ in batches]
        pooled[name] = torch.cat(a).cpu()
    y = torch.cat([labels for _, labels in BATCHES])
    sigma = pooled["old"].std(0, correction=0)
    moved = []
    for k in range(4):
        old, after = (pooled[name][y == k] for name in ("old", "new"))
        shift = after.mean(0) - old.mean(0)
        wider = after.std(0, correction=0) - old.std(0, correction=0)
        moved.append((shift**2 + wider**2).sqrt() / sigma)
    p = slicing.shares[site.name]
    expected = (p * torch.stack(moved)).sum(0) / p.sum(0)
    torch.testing.assert_close(found[site.name], expected, rtol=1e-5, atol=1e-7)


def test_drift_is_zero_on_the_old_samples():
    model, slicing = made()
    report = nss.readapt(model, slicing, BATCHES, 0.2, epochs=1, validation=None).report
    assert max(report.drift) == 0


@pytest.mark.parametrize(
    ("batches", "samples", "every"),
    [(1, 7, 1), (127, 7, 1), (128, 7, 2), (300, 7, 4), (15, 64, 1), (16, 64, 2), (99, 64, 12)],
)
def test_of_many_batches_some_are_profiled(batches, samples, every, monkeypatch):
    """Those spread over the whole length; all of them are trained on."""
    readapting = import_module("neusemslice.maintain.readapt")  # the package has the function
    model, slicing = made("lenet")
    x, y = (torch.cat(part)[:samples] for part in zip(*SHIFTED, strict=True))
    many = [(x + i / batches, y) for i in range(batches)]
    seen = []
    real = readapting.profile

    def counting(model, loader, *args, **options):
        seen.extend(loader)
        return real(model, seen, *args, **options)

    monkeypatch.setattr(readapting, "profile", counting)
    result = nss.readapt(model, slicing, many, 0.3, epochs=1, validation=None)
    expected = many[::every]
    assert len(seen) == readapting.profiled_batches(batches, samples, classes=4) == len(expected)
    assert all(own is x for (own, _), (x, _) in zip(seen, expected, strict=True))
    assert result.report.training.steps == batches


def test_optimizer_state_is_that_of_the_tuned_rows():
    model, slicing = made()
    result = nss.readapt(model, slicing, SHIFTED, budget=0.3, epochs=1)
    rows = sum(len(rows) for _, rows in tuned_rows(result).values())
    assert result.report.training.optimizer_bytes == 4 * (2 * result.report.tuned_parameters + rows)


def test_the_same_result_twice():
    model, slicing = made()
    one, two = (nss.readapt(model, slicing, SHIFTED, budget=0.3, epochs=2) for _ in range(2))
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[key])


class TestValidation:
    def test_the_best_state_is_kept(self):
        """Steps that are far too large: no epoch is better than the model as it was."""
        model, slicing = made()
        result = nss.readapt(model, slicing, BATCHES, 0.5, epochs=9, lr=30.0, validation=SHIFTED)
        report = result.report
        assert report.new_after == score(result.model, SHIFTED, "test")
        assert report.new_after.accuracy >= report.new_before.accuracy
        assert report.best_epoch == 0
        assert len(report.training.losses) == 3
        assert result.delta.nbytes == 0

    def test_a_share_is_held_out_by_content(self):
        """Shuffled anew in each pass, the same samples are seen in training."""
        x, y = (torch.cat(parts) for parts in zip(*SHIFTED, strict=True))
        seen = set()

        class Spy(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, x):
                if torch.is_grad_enabled():
                    seen.update(row.numpy().tobytes() for row in x.cpu())
                return self.model(x)

        model = Spy(settled(IMAGES["residual"](), 1, 8, 8))
        slicing = nss.slice(nss.profile(model, BATCHES), threshold=0.9)
        seen.clear()
        shuffled = DataLoader(TensorDataset(x, y), 7, shuffle=True)
        nss.readapt(model, slicing, shuffled, 0.5, epochs=3, validation=0.25)
        held = held_out(Inputs((x,)), 0.25)
        assert 8 < int(held.sum()) < 40
        assert seen == {row.numpy().tobytes() for row in x[~held]}

    @pytest.mark.pretended
    def test_old_samples_join_the_batches_and_are_held_out_too(self):
        model, slicing = made()
        options = {"epochs": 2, "validation": 0.25, "old": BATCHES}
        alone = nss.readapt(model, slicing, SHIFTED, 0.5, **options)
        mixed = nss.readapt(model, slicing, SHIFTED, 0.5, **options, replay=True)
        assert alone.report.old_before.samples == 96
        assert 8 < mixed.report.old_before.samples < 40
        assert mixed.report.training.steps == alone.report.training.steps
        assert mixed.report.training.losses != alone.report.training.losses


def test_batches_of_another_form():
    model, slicing = made()
    turned = [(y, x) for x, y in SHIFTED]

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, y, x):
            return self.model(x)

    options = {"epochs": 2, "validation": 0.25}
    plain = nss.readapt(model, slicing, SHIFTED, 0.5, **options).report
    named = [{"x": x, "labels": y} for x, y in SHIFTED]
    assert nss.readapt(model, slicing, named, 0.5, **options).report.new_after == plain.new_after
    wrapped = Turned()
    slicing = nss.slice(nss.profile(wrapped, turned, labels=lambda batch: batch[0]), threshold=0.9)
    other = nss.readapt(wrapped, slicing, turned, 0.5, **options, labels=lambda batch: batch[0])
    assert other.report.training.steps == plain.training.steps


class TestRecalibration:
    @pytest.mark.pretended
    def test_statistics_are_those_of_the_new_samples(self):
        model, _ = made()
        before = copy.deepcopy(model.stem_bn)
        recalibrate(model, SHIFTED)
        mean, var = (
            torch.stack(found).mean(0) for found in zip(*stem_statistics(model), strict=True)
        )
        stem = model.stem_bn
        torch.testing.assert_close(stem.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stem.running_var.double(), var, rtol=1e-4, atol=1e-5)
        assert stem.momentum == before.momentum
        assert torch.equal(stem.num_batches_tracked, before.num_batches_tracked)
        assert not stem.training

    @pytest.mark.pretended
    def test_statistics_follow_the_batches_that_the_model_is_tuned_with(self):
        model, slicing = made()
        result = nss.readapt(
            model, slicing, SHIFTED, 0.3, epochs=2, validation=None, recalibrate=True, lr=1e-12
        )
        stem, found = result.model.stem_bn, stem_statistics(model)
        for index, buffer in enumerate((stem.running_mean, stem.running_var)):
            expected = torch.stack([batch[index] for batch in found]).mean(0)
            for batch in 2 * found:
                expected = expected.lerp(batch[index], stem.momentum)
            torch.testing.assert_close(buffer.double(), expected, rtol=1e-4, atol=1e-5)
        assert int(stem.num_batches_tracked) == int(model.stem_bn.num_batches_tracked) + 2 * len(
            found
        )
        assert not stem.training

    def test_the_best_state_has_its_own_statistics(self):
        model, slicing = made()
        wrong = [(x, (y + 1) % 4) for x, y in SHIFTED[:2]]  # what is learned makes it worse
        options = {"validation": wrong, "recalibrate": True, "lr": 1e-2}
        result = nss.readapt(model, slicing, 10 * SHIFTED, 0.5, epochs=2, **options)
        assert result.report.best_epoch == 0
        assert score(result.model, wrong, "test") == result.report.new_after
        count = model.stem_bn.num_batches_tracked
        assert torch.equal(result.model.stem_bn.num_batches_tracked, count)

    def test_batches_of_old_and_new_samples_are_normalised_together(self):
        model, slicing = made()
        options = {"epochs": 1, "validation": None, "recalibrate": True, "lr": 1e-12}
        old = [(x - 3, y) for x, y in BATCHES]
        result = nss.readapt(model, slicing, SHIFTED, 0.3, old=old, replay=True, **options)
        both = [(torch.cat([a, b]), y) for (a, y), (b, _) in zip(SHIFTED, old, strict=True)]
        expected = torch.stack([mean for mean, _ in stem_statistics(model)]).mean(0)
        for mean, _ in stem_statistics(model, both):
            expected = expected.lerp(mean, 0.1)
        found = result.model.stem_bn.running_mean.double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_an_error_leaves_them_alone(self):
        model, _ = made()
        before = copy.deepcopy(model.state_dict())

        def broken():
            yield from SHIFTED[:3]
            raise OSError("gone")

        with pytest.raises(OSError, match="gone"):
            recalibrate(model, broken())
        for key, value in before.items():
            assert torch.equal(model.state_dict()[key], value), key
        assert not any(module.training for module in model.modules())


class TestRefusals:
    @pytest.mark.parametrize("bad", [0.0, -0.1, 1.1, float("nan")])
    def test_budget(self, bad):
        model, slicing = made()
        with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\], got"):
            nss.readapt(model, slicing, SHIFTED, budget=bad)

    def test_a_budget_below_one_neuron(self):
        model, slicing = made()
        with pytest.raises(ValueError, match=r"0\.001 of \d+ neurons is less than one"):
            nss.readapt(model, slicing, SHIFTED, budget=0.001)

    def test_another_model_and_no_data(self):
        model, slicing = made()
        with pytest.raises(ValueError, match="belongs to another model"):
            nss.readapt(Mlp(), slicing, SHIFTED)
        with pytest.raises(ValueError, match="loader yielded no batch"):
            nss.readapt(model, slicing, [])

    @pytest.mark.filterwarnings("ignore:profile. NaN or infinite:RuntimeWarning")
    def test_nonfinite_samples(self):
        model, slicing = made()
        bad = [(x.masked_fill(x > 2, torch.nan), y) for x, y in SHIFTED]
        with pytest.raises(
            ValueError, match="new samples have NaN or infinite activations at stem"
        ):
            nss.readapt(model, slicing, bad)

    @pytest.mark.parametrize("validation", [None, 0.2])
    def test_a_last_step_that_leaves_nothing_finite(self, validation):
        """No loss shows it."""
        model, slicing = made()
        before = copy.deepcopy(model.state_dict())
        x, y = (torch.cat(part) for part in zip(*SHIFTED, strict=True))
        with pytest.raises(ValueError, match="readapt: epoch 1 gave weights that are not finite"):
            nss.readapt(model, slicing, [(x, y)], epochs=1, lr=1e38, validation=validation)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    @pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, float("nan"), 2])
    def test_a_share_that_is_none(self, bad):
        model, slicing = made()
        with pytest.raises(ValueError, match=r"validation must be a share in \(0, 1\), a loader"):
            nss.readapt(model, slicing, SHIFTED, validation=bad)

    @pytest.mark.parametrize(("share", "word"), [(1e-9, "none"), (1 - 1e-9, "all")])
    def test_a_share_that_leaves_nothing(self, share, word):
        model, slicing = made()
        with pytest.raises(ValueError, match=rf"validation=\S+ holds {word} of the samples"):
            nss.readapt(model, slicing, SHIFTED, validation=share)

    def test_replay_and_patience(self):
        model, slicing = made()
        with pytest.raises(ValueError, match="replay needs old samples"):
            nss.readapt(model, slicing, SHIFTED, replay=True)
        with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
            nss.readapt(model, slicing, SHIFTED, patience=0)

    def test_epochs(self):
        model, slicing = made()
        with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
            nss.readapt(model, slicing, SHIFTED, epochs=0)
