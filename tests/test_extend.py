"""Extension learns new classes and leaves every old answer as it was, bit for bit."""

import copy

import pytest
import torch
from helpers import num_threads
from models import IMAGES, Mlp, images, loader, settled
from torch import nn

import neusemslice as nss

OLD = loader(96)
NEW = [(1.3 - x, y + 4) for x, y in loader(96)]
X = images(11, 1, 8, 8, seed=1)


def made(name="residual", threshold=0.6):
    model = settled(IMAGES[name](), 1, 8, 8)
    return model, nss.slice(nss.profile(model, OLD), threshold=threshold)


@pytest.mark.parametrize("name", ["lenet", "residual", "padded", "concatenated", "depthwise"])
@pytest.mark.parametrize("threads", [1, 2])
def test_old_answers_keep_their_bits(name, threads):
    model, slicing = made(name)
    before = copy.deepcopy(model.state_dict())
    with num_threads(threads):
        result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=2, weight_decay=0.1)
        with result.frozen.applied(model):
            expected = model(X)
        result.model.eval()
        assert torch.equal(result.model.task("old")(X), expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"the given model's {key} changed"
    assert result.report.unchanged


@pytest.mark.parametrize("name", ["lenet", "residual"])
def test_consolidation_makes_the_old_slice_stand_alone(name):
    model, slicing = made(name)
    before = copy.deepcopy(model.state_dict())
    result = nss.extend(model, slicing, NEW, old=OLD, capacity=0.5, epochs=2, old_epochs=6)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"the given model's {key} changed"
    losses = result.report.consolidation.training.losses
    assert losses[-1] < losses[0]
    free = ~result.frozen
    for site in free.graph.sites:
        neurons = free.mask(site.name).nonzero().squeeze(1)
        for span in site.rows:
            if span.tensor.endswith(("weight", "bias")):  # statistics may move, weights may not
                rows = span.indices(neurons)
                untouched = result.base.state_dict()[span.tensor].index_select(span.dim, rows)
                assert torch.equal(untouched, before[span.tensor].index_select(span.dim, rows))
    with result.frozen.applied(result.base):
        expected = result.base.eval()(X)
    assert torch.equal(result.model.eval().task("old")(X), expected)


def test_without_old_data_the_base_is_the_given_model():
    model, slicing = made("lenet")
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1)
    assert result.base is model
    assert result.report.consolidation is None


def test_only_free_rows_and_their_columns_changed():
    model, slicing = made("residual")
    before = copy.deepcopy(model.state_dict())
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=2)
    free = ~result.frozen
    for key, value in result.model.backbone.state_dict().items():
        moved = value != before[key]
        for site in free.graph.sites:
            neurons = free.mask(site.name).nonzero().squeeze(1)
            for span in (*site.rows, *site.columns):
                if span.tensor == key:
                    moved.index_fill_(span.dim, span.indices(neurons), False)
        assert not moved.any(), key
    assert torch.equal(result.model.backbone.conv2.weight, model.conv2.weight) is False


def test_coupled_sites_are_frozen_whole():
    model, slicing = made("residual")
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1)
    assert result.frozen.mask("conv2").all()
    assert result.frozen.mask("outer").all()
    assert int(result.frozen.mask("inner").sum()) == 5


def test_without_a_capacity_what_no_class_needs_is_free():
    model, slicing = made("lenet", threshold=0.5)
    result = nss.extend(model, slicing, NEW, epochs=1)
    assert result.frozen == slicing.critical_slice()


def test_it_learns_the_new_classes():
    model, slicing = made("lenet")
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=15, lr=1e-2)
    x, y = torch.cat([b[0] for b in NEW]), torch.cat([b[1] for b in NEW])
    result.model.eval()
    accuracy = (result.model.task("new")(x).argmax(1) == y - 4).float().mean()
    assert accuracy > 0.7
    assert result.report.new_classes == (4, 5, 6, 7)
    assert result.report.old_classes == (0, 1, 2, 3)


def test_log_probabilities_over_all_classes_by_global_number():
    model, slicing = made("lenet")
    gaps = [(x, y + 1) for x, y in NEW]  # classes 5-8; nobody knows class 4
    result = nss.extend(model, slicing, gaps, capacity=0.5, epochs=1)
    found = result.model(X)
    assert found.shape == (11, 9)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(11))
    assert (found[:, 4] == -torch.inf).all()
    for name, own in (("old", [0, 1, 2, 3]), ("new", [5, 6, 7, 8])):
        within = result.model.task(name)(X).log_softmax(1)
        torch.testing.assert_close(found[:, own].log_softmax(1), within)
    assert torch.equal(result.model.choose(X), found[:, 4:].logsumexp(1).gt(-0.6931472).long())


def test_a_nan_in_a_free_neuron_does_not_reach_old_answers():
    model, slicing = made("lenet")
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1)
    model_ = result.model.eval()
    expected = model_.task("old")(X)
    free = (~result.frozen).mask("3").nonzero().squeeze(1)
    with torch.no_grad():
        model_.backbone[3].weight[free] = torch.nan
    assert torch.equal(model_.task("old")(X), expected)


def test_saving_and_loading_keeps_the_bits():
    model, slicing = made("residual")
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1)
    other = nss.extend(model, slicing, NEW, capacity=0.5, epochs=2)
    other.model.load_state_dict(result.model.state_dict())
    for task in ("old", "new"):
        a, b = (m.eval().task(task)(X) for m in (result.model, other.model))
        assert torch.equal(a, b)


class TestRefusals:
    def test_old_labels_in_the_new_data(self):
        model, slicing = made()
        with pytest.raises(ValueError, match=r"the new data holds old classes: \[2, 3\]"):
            nss.extend(model, slicing, [(x, y - 2) for x, y in NEW], capacity=0.5)

    def test_a_saturated_model(self):
        model = settled(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 4)), 1, 8, 8
        )
        slicing = nss.slice(nss.profile(model, OLD), threshold=1.0)
        with pytest.raises(ValueError, match="no neuron is free"):
            nss.extend(model, slicing, NEW)

    @pytest.mark.parametrize("bad", [0.0, 1.0, -1.0, float("nan")])
    def test_capacity(self, bad):
        model, slicing = made()
        with pytest.raises(ValueError, match=r"capacity must lie in \(0, 1\), got"):
            nss.extend(model, slicing, NEW, capacity=bad)

    def test_no_labelled_sample_and_no_batch(self):
        model, slicing = made()
        with pytest.raises(ValueError, match="has no labelled sample"):
            nss.extend(model, slicing, [(x, torch.full_like(y, -100)) for x, y in NEW])
        with pytest.raises(ValueError, match="loader yielded no batch"):
            nss.extend(model, slicing, [])

    def test_a_head_that_is_no_linear_layer(self):
        model = settled(
            nn.Sequential(
                nn.Conv2d(1, 6, 3),
                nn.ReLU(),
                nn.Conv2d(6, 4, 3),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            ),
            1,
            8,
            8,
        )
        slicing = nss.slice(nss.profile(model, OLD), threshold=0.5)
        with pytest.raises(ValueError, match=r"head 2 must be a linear layer.*got Conv2d"):
            nss.extend(model, slicing, NEW, capacity=0.5)

    def test_another_model(self):
        _, slicing = made()
        with pytest.raises(ValueError, match="belongs to another model"):
            nss.extend(Mlp(), slicing, NEW)

    def test_unknown_task(self):
        model, slicing = made()
        result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1)
        with pytest.raises(KeyError, match=r"no task 'animals'; there are \['old', 'new'\]"):
            result.model.task("animals")
