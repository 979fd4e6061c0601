"""Removal is physical, equals masking on every network, and meets its target or says why not."""

import copy
import functools
import sys
from dataclasses import replace

import pytest
import torch
from helpers import here
from models import IMAGES, Mlp, Reused, images, loader, settled
from torch import nn

import neusemslice as nss
from neusemslice import Slice
from neusemslice.graph import cut as cut_copy
from neusemslice.maintain import cutting, measure, parameter_count
from neusemslice.maintain import restructure as restructure_function
from neusemslice.maintain.cost import sliced_cost
from neusemslice.maintain.cutting import TOLERANCE, check_pruned, prune

BATCHES = loader()
cut = functools.partial(nss.restructure, compensate=False)
pytestmark = pytest.mark.usefixtures("device")

X = images(9, 1, 8, 8, seed=1)


def made(name="lenet", threshold=0.8, device=None):
    torch.manual_seed(1)
    model = settled(IMAGES[name](), 1, 8, 8, device=device)
    return model, nss.slice(nss.profile(model, BATCHES), threshold=threshold)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_pruned_equals_masked(name, keep, device):
    model, slicing = made(name, device=device)
    x = here(X)
    before = copy.deepcopy(model.state_dict())
    result = cut(model, slicing, calibration=BATCHES, keep=keep)
    with result.kept.applied(model):
        masked = model(x)
    pruned = result.model(x)
    assert (pruned - masked).abs().max() <= TOLERANCE * masked.abs().max()
    assert result.report.difference <= TOLERANCE
    if name == "grouped":  # nothing of it may be removed one by one
        assert result.kept == Slice.whole(slicing.profile.graph)
    else:
        assert parameter_count(result.model) < parameter_count(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_unequal_widths_and_exactly_these_neurons():
    model, slicing = made("lenet")
    kept = Slice(
        slicing.profile.graph,
        {
            "0": torch.tensor([0, 1, 0, 0], dtype=torch.bool),
            "3": torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.bool),
            "7": torch.arange(10) % 3 == 0,
        },
    )
    result = cut(model, kept, calibration=BATCHES)
    assert result.kept == kept
    assert result.report.widths == {"0": (4, 1), "3": (6, 3), "7": (10, 4)}
    assert torch.equal(result.model[0].weight, model[0].weight[1:2])
    assert torch.equal(result.model[4].running_var, model[4].running_var[[0, 2, 5]])
    expected = model[7].weight.view(10, 6, 16)[::3, [0, 2, 5]].flatten(1)
    assert torch.equal(result.model[7].weight, expected)
    assert result.model[7].in_features == 48


def test_calibration_needs_no_labels():
    model, slicing = made("lenet")
    for batches in ([X], [{"input": X}], [(X, torch.zeros(9))]):
        assert cut(model, slicing, calibration=batches, keep=0.5).model(here(X)).shape == (
            9,
            4,
        )


def test_without_a_target_the_critical_slice_stays():
    model, slicing = made("lenet", threshold=0.5)
    result = cut(model, slicing, calibration=BATCHES)
    assert result.kept == slicing.critical_slice()


def test_coupled_neurons_stay_together_and_broken_groups_stay_whole():
    model, slicing = made("residual")
    result = cut(model, slicing, calibration=BATCHES, keep=0.5)
    assert torch.equal(result.kept.mask("conv2"), result.kept.mask("outer"))
    model, slicing = made("padded")
    result = cut(model, slicing, calibration=BATCHES, keep=0.5)
    assert result.report.widths == {"stem": (4, 4), "conv1": (8, 4), "conv2": (8, 8)}
    assert set(result.report.kept_whole) == {"stem", "conv2"}


class TestTargets:
    @pytest.mark.parametrize("name", ["lenet", "residual", "concatenated", "depthwise"])
    @pytest.mark.parametrize("target", ["macs", "params"])
    def test_is_met_closely(self, name, target):
        model, slicing = made(name)
        result = cut(model, slicing, calibration=BATCHES, **{target: 0.5})
        before, after = result.report.before, result.report.after
        field = {"macs": "macs", "params": "parameters"}[target]
        assert getattr(after, field) <= 0.5 * getattr(before, field)
        # One neuron more in each group would be too much.
        more = {s: min(b, a + 1) for s, (b, a) in result.report.widths.items()}
        graph = slicing.profile.graph
        wider = Slice(graph, {s.name: torch.arange(s.neurons) < more[s.name] for s in graph.sites})
        parameters, macs = sliced_cost(model, graph, wider)
        assert {"macs": macs, "params": parameters}[target] > 0.5 * getattr(before, field)

    @pytest.mark.parametrize("name", IMAGES)
    def test_the_planned_cost_is_the_measured_one(self, name):
        model, slicing = made(name)
        result = cut(model, slicing, calibration=BATCHES, keep=0.5)
        planned = sliced_cost(model, slicing.profile.graph, result.kept)
        assert planned == (result.report.after.parameters, result.report.after.macs)

    def test_the_most_important_neurons_stay(self):
        model, slicing = made("lenet")
        result = cut(model, slicing, calibration=BATCHES, keep=0.5)
        for site, (before, after) in result.report.widths.items():
            best = slicing.importance(site).sort(descending=True, stable=True).indices[:after]
            assert result.kept.mask(site).nonzero().squeeze(1).tolist() == sorted(best.tolist())
            assert after == -(-before // 2)

    def test_one_that_cannot_be_met(self):
        model, slicing = made("padded")
        with pytest.raises(
            ValueError, match=r"macs=0\.01 cannot be met; the fewest neurons per group leave"
        ):
            cut(model, slicing, calibration=BATCHES, macs=0.01)

    @pytest.mark.parametrize("target", ["params", "keep"])
    def test_widths_are_multiples(self, target):
        model, slicing = made("lenet")
        result = cut(model, slicing, calibration=BATCHES, round_to=2, **{target: 0.6})
        widths = result.report.widths
        assert all(after % 2 == 0 or after == before for before, after in widths.values())
        assert any(after < before for before, after in widths.values())
        if target == "params":
            assert result.report.after.parameters <= 0.6 * result.report.before.parameters

    def test_latency_is_searched_by_what_is_measured(self, monkeypatch):
        """A clock that goes by the parameters, so that the answer is known."""
        from neusemslice.maintain import restructure as module

        measured = []

        def clock(model, inputs):
            measured.append(parameter_count(model))
            return parameter_count(model) / 1000

        monkeypatch.setattr(sys.modules[module.__module__], "measure_latency", clock)
        model, slicing = made("lenet")
        result = cut(model, slicing, calibration=BATCHES, latency=0.5)
        left = parameter_count(result.model) / parameter_count(model)
        assert left <= 0.5
        by_count = cut(model, slicing, calibration=BATCHES, params=0.5)
        assert left >= 0.9 * parameter_count(by_count.model) / parameter_count(model)
        assert measured[0::2] == [parameter_count(model)] * (len(measured) // 2)

    def test_a_target_of_one_keeps_all(self):
        model, slicing = made("lenet")
        result = cut(model, slicing, calibration=BATCHES, params=1.0)
        assert result.kept == Slice.whole(slicing.profile.graph)
        assert torch.equal(result.model(here(X)), model(here(X)))


class TestRefusals:
    def test_targets(self):
        model, slicing = made()
        with pytest.raises(ValueError, match=r"give one target, got \['keep', 'macs'\]"):
            cut(model, slicing, calibration=BATCHES, macs=0.5, keep=0.5)
        for bad in (0.0, 1.5, float("nan")):
            with pytest.raises(ValueError, match=r"macs must lie in \(0, 1\], got"):
                cut(model, slicing, calibration=BATCHES, macs=bad)
        with pytest.raises(ValueError, match="round_to must be at least 1, got 0"):
            cut(model, slicing, calibration=BATCHES, macs=0.5, round_to=0)
        with pytest.raises(ValueError, match="needs a slicing to rank neurons by"):
            cut(model, slicing.critical_slice(), calibration=BATCHES, macs=0.5)

    def test_another_model(self):
        _, slicing = made()
        with pytest.raises(ValueError, match="belongs to another model"):
            cut(Mlp(), slicing, calibration=loader(shape=(12,)), macs=0.5)

    def test_a_site_without_a_neuron(self):
        model, slicing = made()
        with pytest.raises(ValueError, match="no neuron of site 0 would be left"):
            cut(model, Slice(slicing.profile.graph, {}), calibration=BATCHES)

    def test_no_calibration(self):
        model, slicing = made()
        with pytest.raises(ValueError, match="restructure: the loader yielded no batch"):
            cut(model, slicing, calibration=[], macs=0.5)


class TestWrongMapping:
    """A mapping that cuts other neurons than it says must not get through."""

    @pytest.mark.parametrize("name", ["lenet", "residual", "concatenated"])
    def test_raises_and_names_the_site(self, name, monkeypatch):
        def wrong(model, graph, masks):
            return cut_copy(model, graph, {site: mask.roll(1) for site, mask in masks.items()})

        model, slicing = made(name)
        first = slicing.profile.graph.sites[0].name
        monkeypatch.setattr(cutting, "cut", wrong)
        with pytest.raises(RuntimeError, match=f"differs from the masked.*at site {first}"):
            cut(model, slicing, calibration=BATCHES, keep=0.5)

    @pytest.mark.parametrize("name", ["lenet", "residual", "concatenated", "depthwise"])
    def test_a_wrong_column_raises(self, name, monkeypatch):
        """Readers that lose the weights of a neuron that stays."""

        def wrong(model, graph, masks):
            shifted = {site: mask.roll(1) for site, mask in masks.items()}
            rows = replace(graph, sites=tuple(replace(s, columns=()) for s in graph.sites))
            columns = tuple(replace(s, rows=(), counts=()) for s in graph.sites)
            return cut_copy(cut_copy(model, rows, masks), replace(graph, sites=columns), shifted)

        model, slicing = made(name)
        monkeypatch.setattr(cutting, "cut", wrong)
        with pytest.raises(RuntimeError, match="the pruned model differs from the masked one"):
            cut(model, slicing, calibration=BATCHES, keep=0.5)

    def test_a_cut_that_does_not_fit_raises(self, monkeypatch):
        def half(model, graph, masks):
            sites = tuple(replace(site, columns=()) for site in graph.sites)
            return cut_copy(model, replace(graph, sites=sites), masks)

        model, slicing = made("residual")
        monkeypatch.setattr(cutting, "cut", half)
        with pytest.raises(RuntimeError, match="the pruned model does not run"):
            cut(model, slicing, calibration=BATCHES, keep=0.5)

    def test_a_changed_weight_is_noticed(self):
        from neusemslice.graph import Inputs

        model, slicing = made("lenet")
        kept = Slice.whole(slicing.profile.graph)
        pruned = prune(model, kept)
        with torch.no_grad():
            pruned[7].weight[0, 0] += 0.5
        with pytest.raises(RuntimeError, match="first difference is at site 7"):
            check_pruned(model, pruned, kept, Inputs((here(X),)))


def test_flags_and_modes_are_the_models_own():
    model, slicing = made("lenet")
    model.train()
    model[0].bias.requires_grad_(False)
    result = cut(model, slicing, calibration=BATCHES, keep=0.5)
    assert model.training
    assert result.model.training
    assert [n for n, p in result.model.named_parameters() if not p.requires_grad] == ["0.bias"]


def test_a_module_used_twice_is_left_whole():
    model = settled(Reused(), 12)
    batches = loader(shape=(12,))
    slicing = nss.slice(nss.profile(model, batches))
    result = cut(model, slicing, calibration=batches, keep=0.5)
    assert result.model.twice.weight.shape == (8, 8)
    assert result.report.widths == {"last": (8, 4)}


def test_the_result_trains():
    model, slicing = made("residual")
    result = restructure_function(model, slicing, calibration=BATCHES, macs=0.6)
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.01)
    result.model.train()
    before = measure(result.model, nss.graph.Inputs((here(X),))).parameters
    nn.functional.cross_entropy(result.model(here(X)), here(torch.arange(9) % 4)).backward()
    optimizer.step()
    assert parameter_count(result.model) == before
