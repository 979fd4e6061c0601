"""Re-adaptation tunes the critical rows it chose, and not a bit else."""

import copy

import pytest
import torch
from models import IMAGES, Mlp, loader, settled

import neusemslice as nss

BATCHES = loader(96)
SHIFTED = [(x * 1.5 + 0.7, y) for x, y in BATCHES]


def made(name="residual", threshold=0.9):
    model = settled(IMAGES[name](), 1, 8, 8)
    return model, nss.slice(nss.profile(model, BATCHES), threshold=threshold)


@pytest.mark.parametrize("name", IMAGES)
def test_everything_outside_the_tuned_rows_keeps_its_bits(name):
    model, slicing = made(name)
    before = copy.deepcopy(model.state_dict())
    result = nss.readapt(model, slicing, SHIFTED, budget=0.4, epochs=2, weight_decay=0.1)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"the given model's {key} changed"
    after = result.model.state_dict()
    owners = {id(p): n for n, p in result.model.named_parameters()}
    tuned = {}
    for group in result.tuned.parameters(result.model):
        for p, dim, rows in zip(group["params"], group["neuron_dims"], group["rows"], strict=True):
            tuned[owners[id(p)]] = (dim, rows)
    moved = 0
    for key, value in after.items():
        expected = before[key]
        if key in tuned:
            dim, rows = tuned[key]
            moved += int((value != expected).any())
            expected = expected.index_copy(dim, rows, value.index_select(dim, rows))
        assert torch.equal(value, expected), key
    assert moved == len(tuned) > 0


def test_it_fits_the_new_samples():
    model, slicing = made("lenet")

    def loss(module):
        with torch.no_grad():
            return sum(
                torch.nn.functional.cross_entropy(module(x), y, reduction="sum") for x, y in SHIFTED
            )

    result = nss.readapt(model, slicing, SHIFTED, budget=0.5, epochs=25, lr=1e-2)
    assert loss(result.model) < 0.8 * loss(model)
    assert result.report.training.losses[-1] < result.report.training.losses[0]


def test_the_budget_is_kept_and_used():
    model, slicing = made()
    neurons = slicing.profile.graph.neurons
    critical = slicing.critical_slice()
    for budget in (0.1, 0.25, 1.0):
        result = nss.readapt(model, slicing, SHIFTED, budget=budget, epochs=1)
        assert len(result.tuned) == min(int(budget * neurons), len(critical))
        assert len(result.tuned - critical) == 0
        assert result.report.tuned_neurons == len(result.tuned) / neurons


def test_components_are_tuned_in_the_order_of_their_drift():
    model, slicing = made()
    report = nss.readapt(model, slicing, SHIFTED, budget=0.5, epochs=1).report
    drifts = [report.drift[c] for c in report.components]
    assert drifts == sorted(report.drift, reverse=True)[: len(drifts)]


def test_drift_is_zero_on_the_old_samples():
    model, slicing = made()
    report = nss.readapt(model, slicing, BATCHES, budget=0.2, epochs=1).report
    assert max(report.drift) == 0


def test_optimizer_state_is_that_of_the_tuned_rows():
    model, slicing = made()
    result = nss.readapt(model, slicing, SHIFTED, budget=0.3, epochs=1)
    elements = result.report.tuned_parameters
    rows = sum(len(r) for g in result.tuned.parameters(result.model) for r in g["rows"])
    assert result.report.training.optimizer_bytes == 4 * (2 * elements + rows)


def test_the_same_result_twice():
    model, slicing = made()
    one, two = (nss.readapt(model, slicing, SHIFTED, budget=0.3, epochs=2) for _ in range(2))
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[key])


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

    def test_epochs(self):
        model, slicing = made()
        with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
            nss.readapt(model, slicing, SHIFTED, epochs=0)
