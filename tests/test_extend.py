"""Extension learns new classes and leaves every old answer as it was, bit for bit."""

import copy
import math

import pytest
import torch
from helpers import here, num_threads
from models import IMAGES, Mlp, images, loader, settled
from torch import nn

import neusemslice as nss
from neusemslice.maintain import task_accuracies

OLD = loader(96)
NEW = [(1.3 - x, y + 4) for x, y in loader(96)]
pytestmark = pytest.mark.usefixtures("device")

X = images(11, 1, 8, 8, seed=1)


def made(name="residual", threshold=0.6, device=None):
    model = settled(IMAGES[name](), 1, 8, 8, device=device)
    return model, nss.slice(nss.profile(model, OLD), threshold=threshold)


@pytest.mark.parametrize("name", ["lenet", "residual", "padded", "concatenated", "depthwise"])
@pytest.mark.parametrize("threads", [1, 2])
def test_old_answers_keep_their_bits(name, threads, device):
    model, slicing = made(name, device=device)
    x = here(X)
    before = copy.deepcopy(model.state_dict())
    with num_threads(threads):
        result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=2, weight_decay=0.1)
        with result.frozen.applied(model):
            expected = model(x)
        result.model.eval()
        assert torch.equal(result.model.task("old")(x), expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"the given model's {key} changed"
    assert result.report.unchanged


def test_consolidation_has_a_learning_rate_of_its_own():
    model, slicing = made("lenet")
    options = {"old": OLD, "capacity": 0.5, "epochs": 1, "old_epochs": 1, "lr": 1e-2}
    alike, given, slower = (
        nss.extend(model, slicing, NEW, **options, **rate).base.state_dict()
        for rate in ({}, {"old_lr": 1e-2}, {"old_lr": 1e-3})
    )
    assert all(torch.equal(given[key], value) for key, value in alike.items())
    assert not all(torch.equal(slower[key], value) for key, value in alike.items())


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
        neurons = here(free.mask(site.name).nonzero().squeeze(1))
        for span in site.rows:
            if span.tensor.endswith(("weight", "bias")):  # statistics may move, weights may not
                rows = span.indices(neurons)
                untouched = result.base.state_dict()[span.tensor].index_select(span.dim, rows)
                assert torch.equal(untouched, before[span.tensor].index_select(span.dim, rows))
    with result.frozen.applied(result.base):
        expected = result.base.eval()(here(X))
    assert torch.equal(result.model.eval().task("old")(here(X)), expected)


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
            neurons = here(free.mask(site.name).nonzero().squeeze(1))
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
    image = {"0": torch.ones(4, dtype=torch.bool)}
    assert result.frozen == slicing.critical_slice() | nss.Slice(slicing.profile.graph, image)


def test_layers_that_read_an_image_stay_whole():
    model, slicing = made("lenet")
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1)
    assert result.frozen.mask("0").all()
    assert result.report.left == {"3": (6, 0), "7": (10, 0)}


def test_of_old_neurons_those_go_first_that_others_make_up_for():
    """Two neurons that are the same: without samples both are important, with them one is."""
    model, slicing = made("lenet")
    one, other = slicing.importance("3").argsort()[[-1, 0]].tolist()
    with torch.no_grad():
        for tensor in (*model[3].state_dict().values(), *model[4].state_dict().values()):
            if tensor.ndim:
                tensor[other] = tensor[one]
        columns = model[7].weight.unflatten(1, (6, 16))
        columns[:, other] = columns[:, one]
    slicing = nss.slice(nss.profile(model, OLD), threshold=0.6)
    blind = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1)
    told = nss.extend(model, slicing, NEW, old=OLD, capacity=0.5, epochs=1)
    assert blind.frozen.mask("3")[[one, other]].all()
    assert int(told.frozen.mask("3")[[one, other]].sum()) == 1
    assert int(told.frozen.mask("3").sum()) == int(blind.frozen.mask("3").sum()) == 3


def test_it_learns_the_new_classes():
    model, slicing = made("lenet")
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=15, lr=1e-2)
    x, y = (here(torch.cat(parts)) for parts in zip(*NEW, strict=True))
    result.model.eval()
    accuracy = (result.model.task("new")(x).argmax(1) == y - 4).float().mean()
    assert accuracy > 0.7
    assert result.report.new_classes == (4, 5, 6, 7)
    assert result.report.old_classes == (0, 1, 2, 3)


def test_log_probabilities_over_all_classes_by_global_number():
    model, slicing = made("lenet")
    gaps = [(x, y + 1) for x, y in NEW]  # classes 5-8; nobody knows class 4
    result = nss.extend(model, slicing, gaps, capacity=0.5, epochs=1)
    found = result.model(here(X))
    assert found.shape == (11, 9)
    torch.testing.assert_close(found.exp().sum(1), here(torch.ones(11)))
    assert (found[:, 4] == -torch.inf).all()
    for name, own in (("old", [0, 1, 2, 3]), ("new", [5, 6, 7, 8])):
        within = result.model.task(name)(here(X)).log_softmax(1)
        torch.testing.assert_close(found[:, own].log_softmax(1), within)
    assert torch.equal(
        result.model.choose(here(X)), found[:, 4:].logsumexp(1).gt(-0.6931472).long()
    )


def test_a_nan_in_a_free_neuron_does_not_reach_old_answers():
    model, slicing = made("lenet")
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1)
    model_ = result.model.eval()
    expected = model_.task("old")(here(X))
    free = (~result.frozen).mask("3").nonzero().squeeze(1)
    with torch.no_grad():
        model_.backbone[3].weight[free] = torch.nan
    assert torch.equal(model_.task("old")(here(X)), expected)


def test_saving_and_loading_keeps_the_bits():
    model, slicing = made("residual")
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1)
    other = nss.extend(model, slicing, NEW, capacity=0.5, epochs=2)
    other.model.load_state_dict(result.model.state_dict())
    for task in ("old", "new"):
        a, b = (m.eval().task(task)(here(X)) for m in (result.model, other.model))
        assert torch.equal(a, b)


@pytest.mark.parametrize("fresh", [True, False])
def test_free_neurons_start_anew_or_from_what_they_are(fresh):
    model, slicing = made("lenet")
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1, lr=0.0, fresh=fresh)
    free, found = ~result.frozen, result.model.backbone
    first, second = (free.mask(name).nonzero().squeeze(1) for name in ("3", "7"))
    read = free.graph.site("3").columns[0].indices(first)
    kept = result.frozen.mask("7").nonzero().squeeze(1)
    assert torch.equal(found[7].weight[second], model[7].weight[second]) is not fresh
    assert found[7].weight[second].abs().max() <= 96**-0.5 or not fresh  # as torch draws them
    assert torch.equal(found[7].weight[kept][:, read], model[7].weight[kept][:, read]) is not fresh
    assert (found[7].weight[kept][:, read] == 0).all() or not fresh


def test_a_new_task_has_batch_norms_of_its_own():
    model, slicing = made("residual")
    result = nss.extend(model, slicing, NEW, capacity=0.5, epochs=2, lr=1e-2)
    own = result.model.parts("new")
    assert set(own) == {"stem_bn", "bn1", "bn2", "head"}
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(result.model.backbone.bn2, name), getattr(model.bn2, name))
        moved = getattr(own["bn2"], name) != getattr(model.bn2, name)
        assert moved.all(), "those of frozen channels too"


def test_a_single_sample_in_a_batch():
    model = settled(
        nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
        ),
        1,
        8,
        8,
    )
    slicing = nss.slice(nss.profile(model, OLD), threshold=0.6)
    new = [(x[:1], y[:1]) for x, y in NEW] + NEW
    result = nss.extend(model, slicing, new, capacity=0.5, epochs=1, old=OLD[:2] + new[:0])
    assert result.report.unchanged


class TestReplay:
    def test_it_tells_tasks_apart(self):
        model, slicing = made("residual")
        board = (torch.arange(8).unsqueeze(1) + torch.arange(8)) % 2 - 0.5
        unlike = [(0.5 * x + board, y + 4) for x, y in OLD]
        options = {"capacity": 0.5, "epochs": 12, "old_epochs": 4, "lr": 1e-2}
        result = nss.extend(model, slicing, unlike, old=OLD, replay=1.0, **options)
        assert result.model.tasks["new"].rejects
        assert result.model.task("new")(here(X)).shape == (11, 4)
        loaders = {"old": OLD, "new": unlike}
        found = task_accuracies(result.model, loaders)
        assert (found["old"].chosen + found["new"].chosen) / 2 > 0.75
        for name in loaders:
            assert found[name].inferred <= found[name].given
        probabilities = result.model(here(X)).exp()
        torch.testing.assert_close(probabilities.sum(1), here(torch.ones(11)))

    def test_some_of_the_old_samples(self):
        model, slicing = made("lenet")
        result = nss.extend(model, slicing, NEW, old=OLD, replay=0.3, capacity=0.5, epochs=1)
        assert result.report.unchanged

    def test_refusals(self):
        model, slicing = made("lenet")
        with pytest.raises(ValueError, match="replay needs old samples"):
            nss.extend(model, slicing, NEW, replay=0.5, capacity=0.5)
        tasks = nss.extend(model, slicing, NEW, capacity=0.5, reserve=0.5, epochs=1).model
        other = [(x, y + 8) for x, y in OLD]
        with pytest.raises(ValueError, match=r"old samples must be of old classes, got \[8,"):
            nss.extend(tasks, None, [(x, y + 12) for x, y in OLD], name="b", old=other, replay=1.0)


class TestGrow:
    @pytest.mark.parametrize("name", ["lenet", "residual", "concatenated", "depthwise"])
    def test_wider_layers_answer_as_before(self, name):
        model, slicing = made(name)
        first = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1)
        assert not len(first.model.free)
        more = [(x.flip(2), y + 8) for x, y in OLD]
        with pytest.raises(ValueError, match=r"no neuron is free.*give grow= to widen"):
            nss.extend(first.model, None, more, name="more")
        grown = nss.extend(first.model, None, more, name="more", grow=0.5, epochs=1)
        for task in ("old", "new"):
            before, after = first.model.task(task)(here(X)), grown.model.task(task)(here(X))
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
            assert torch.equal(after, grown.base.task(task)(here(X))), "a new reference for bits"
        for site in grown.model.graph.sites:
            was = first.frozen.graph.site(site.name).neurons
            widened = site.name in grown.report.left
            assert site.neurons == (was + math.ceil(0.5 * was) if widened else was)
        assert len(grown.model.tasks["more"].slice) == grown.model.graph.neurons
        assert grown.model(here(X)).shape == (11, 12)

    def test_a_model_that_is_extended_for_the_first_time(self):
        model, slicing = made("lenet", threshold=1.0)
        before = copy.deepcopy(model.state_dict())
        result = nss.extend(model, slicing, NEW, grow=0.5, epochs=1)
        assert model[3].out_channels == 6
        assert result.base[3].out_channels == 9
        torch.testing.assert_close(
            result.model.task("old")(here(X)), model(here(X)), rtol=1e-4, atol=1e-5
        )
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])

    def test_no_layer_that_can_be_widened(self):
        model, slicing = made("grouped")
        with pytest.raises(ValueError, match="no layer that can be widened"):
            nss.extend(model, slicing, NEW, grow=0.5)


class TestRefusals:
    def test_names_that_are_taken(self):
        model, slicing = made("lenet")
        with pytest.raises(ValueError, match="there is a task 'old' already"):
            nss.extend(model, slicing, NEW, capacity=0.5, name="old")
        for bad in ("", "a/b", "v1.0"):
            with pytest.raises(ValueError, match="a task's name must have neither"):
                nss.extend(model, slicing, NEW, capacity=0.5, name=bad)
        with pytest.raises(ValueError, match=r"a name of its own, got \['3'\] twice"):
            nss.extend(model, slicing, NEW, capacity=0.5, class_names=["3", "a", "b", "c"])
        with pytest.raises(ValueError, match=r"a name of its own, got .*'a', 'a'.* twice"):
            nss.extend(model, slicing, NEW, capacity=0.5, class_names=["a", "a", "b", "c"])
        with pytest.raises(ValueError, match=r"of the 4 new classes \[4, 5, 6, 7\], got 1"):
            nss.extend(model, slicing, NEW, capacity=0.5, class_names=["a"])

    def test_classes_of_any_task_before(self):
        model, slicing = made("lenet")
        tasks = nss.extend(model, slicing, NEW, capacity=0.5, reserve=0.5, epochs=1).model
        with pytest.raises(ValueError, match=r"holds old classes: \[4, 5, 6, 7\]"):
            nss.extend(tasks, None, NEW, name="again")

    def test_a_slicing_where_none_belongs_and_none_where_one_does(self):
        model, slicing = made("lenet")
        with pytest.raises(ValueError, match="needs the slicing of its classes"):
            nss.extend(model, None, NEW)
        tasks = nss.extend(model, slicing, NEW, capacity=0.5, epochs=1).model
        with pytest.raises(ValueError, match="a TaskSet keeps the slices of its tasks"):
            nss.extend(tasks, slicing, NEW)

    @pytest.mark.parametrize(
        ("option", "bad"), [("reserve", 1.0), ("replay", 1.5), ("grow", -0.5), ("grow", math.inf)]
    )
    def test_shares(self, option, bad):
        model, slicing = made("lenet")
        with pytest.raises(ValueError, match=f"{option} must"):
            nss.extend(model, slicing, NEW, old=OLD, **{option: bad})

    def test_nan_in_the_new_samples_leaves_the_model_alone(self):
        model, slicing = made("residual")
        before = copy.deepcopy(model.state_dict())
        new = [(torch.full_like(x, torch.nan), y) for x, y in NEW]
        with pytest.raises(ValueError, match="loss of epoch 1 is not finite"):
            nss.extend(model, slicing, new, capacity=0.5)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
        tasks = nss.extend(model, slicing, NEW, capacity=0.5, reserve=0.5, epochs=1).model
        expected = tasks.task("new")(here(X))
        with pytest.raises(ValueError, match="loss of epoch 1 is not finite"):
            nss.extend(tasks, None, [(x, y + 4) for x, y in new], name="b")
        assert list(tasks.tasks) == ["old", "new"]
        assert torch.equal(tasks.task("new")(here(X)), expected)

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
