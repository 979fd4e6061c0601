"""Maps that look right and are wrong: nothing may be observed, cut or tuned by them."""

import copy

import pytest
import torch
from helpers import here
from models import Crossed, Tied, Tokens, images, loader, settled
from torch import nn

import neusemslice as nss
from neusemslice.graph import Inputs, trace

pytestmark = pytest.mark.usefixtures("device")

KINDS = ["shuffle", "pixels first", "transpose", "attention"]
WRONG = {
    "shuffle": {"first"},
    "pixels first": {"second"},
    "transpose": {"second", "mixer"},
    "attention": {"query", "key"},
}
"""Layers whose neurons do not arrive one to one at the next one."""


@pytest.fixture(params=KINDS)
def crossed(request):
    return settled(Crossed(request.param), 1, 8, 8)


def traced(model: nn.Module):
    return trace(model, Inputs((here(images(2, 1, 8, 8)),)))


def test_crossed_layers_are_not_observed(crossed):
    graph = traced(crossed)
    names = {site.name for site in graph.sites}
    assert not names & WRONG[crossed.kind]
    assert WRONG[crossed.kind] <= set(graph.skipped)
    assert "plain" in names


def test_what_is_observed_is_what_the_neuron_does(crossed):
    """Moving one neuron changes its own place at the reader and no other."""
    graph = traced(crossed)
    x = here(images(2, 1, 8, 8))
    for site in graph.sites:
        reader = site.readers[0]
        seen = []

        def read(_, args, seen=seen, reader=reader, site=site):
            seen.append(reader.take(args[0], site.neurons).movedim(reader.neuron_dim, -1))

        def move(layer, _, output):
            moved = output.clone()
            moved.select(1 if isinstance(layer, nn.Conv2d) else -1, 3).add_(5)
            return moved

        handle = crossed.get_submodule(reader.module).register_forward_pre_hook(read)
        crossed(x)
        other = crossed.get_submodule(site.name).register_forward_hook(move)
        crossed(x)
        handle.remove()
        other.remove()
        changed = (seen[0] != seen[1]).flatten(0, -2).any(0)
        assert changed.nonzero().flatten().tolist() == [3], site.name


def test_the_rest_of_the_model_can_still_be_maintained(crossed):
    batches = loader(48)
    slicing = nss.slice(nss.profile(crossed, batches))
    small = nss.restructure(crossed, slicing, calibration=batches, keep=0.5, compensate=False)
    assert small.report.widths["plain"] == (12, 6)
    x = here(images(5, 1, 8, 8, seed=3))
    with small.kept.applied(crossed):
        torch.testing.assert_close(small.model(x), crossed(x), rtol=1e-4, atol=1e-5)
    grown = nss.extend(crossed, slicing, [(x, y + 4) for x, y in batches], capacity=0.5, epochs=1)
    with grown.frozen.applied(crossed):
        assert torch.equal(grown.model.eval().task("old")(x), crossed(x))


def test_a_model_that_writes_into_its_activations():
    class InPlace(Crossed):
        def forward(self, x):
            x = self.first(x)
            x *= 2
            x = self.second(torch.relu_(x))
            x += 1
            return self.head(torch.relu_(self.plain(x.mean((2, 3)))))

    graph = traced(settled(InPlace("none"), 1, 8, 8))
    assert [site.name for site in graph.sites] == ["first", "second", "plain"]
    assert not any(group.kept_whole for group in graph.groups)


class TestSharedAndComputedWeights:
    def test_tied_layers_are_left_out(self):
        model = settled(Tied(), 12)
        batches = loader(48, shape=(12,))
        profile = nss.profile(model, batches)
        assert [site.name for site in profile.graph.sites] == ["last"]
        assert "shares a parameter" in profile.graph.skipped["one"]
        slicing = nss.slice(profile)
        small = nss.restructure(model, slicing, calibration=batches, keep=0.5, compensate=False)
        assert small.model.two.weight is small.model.one.weight
        before = copy.deepcopy(model.one.weight)
        fitted = nss.readapt(model, slicing, batches, budget=1.0, epochs=1)
        assert torch.equal(fitted.model.one.weight, before)

    def test_parametrized_layers_are_left_out(self):
        model = settled(Crossed("none"), 1, 8, 8)
        torch.nn.utils.parametrizations.weight_norm(model.second)
        graph = traced(model)
        assert "second" in graph.skipped
        assert "parametrized" in graph.skipped["second"]
        assert "plain" in {site.name for site in graph.sites}


class TestTokens:
    def test_a_norm_without_affine_keeps_its_group_whole(self):
        model = settled(Tokens(), 5, 12)
        batches = loader(24, shape=(5, 12))
        slicing = nss.slice(nss.profile(model, batches))
        small = nss.restructure(model, slicing, calibration=batches, keep=0.5, compensate=False)
        assert small.report.widths["inner"] == (16, 8)
        assert "embed" in small.report.kept_whole or "embed" in slicing.profile.graph.skipped


class TestSeveralOutputs:
    def test_all_of_them_are_protected(self):
        class Two(Crossed):
            def forward(self, x):
                features = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
                return self.head(torch.relu(self.plain(features))), features

        model = settled(Two("none"), 1, 8, 8)
        batches = loader(48)
        slicing = nss.slice(nss.profile(model, batches))
        small = nss.restructure(model, slicing, calibration=batches, keep=0.5, compensate=False)
        assert small.report.widths["first"] == (8, 4)
        assert small.report.widths["second"] == (8, 8)
        assert "part of the model's output" in small.report.kept_whole["second"]
        grown = nss.extend(model, slicing, [(x, y + 4) for x, y in batches], capacity=0.5, epochs=1)
        assert grown.report.unchanged
