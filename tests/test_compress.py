"""Layer-wise sparsity by hand and by its law; compression holds what it says."""

import copy
import math

import pytest
import torch
from helpers import here
from hypothesis import given, settings
from hypothesis import strategies as st
from models import IMAGES, Mlp, images, loader, settled
from torch import nn

from neusemslice.graph import Inputs, trace
from neusemslice.maintain import parameter_count, score
from neusemslice.maintain.compress import _neurons, compress
from neusemslice.maintain.sparsity import METHODS, Units, counts, fewest, strongest

BATCHES = loader(48, shape=(12,))
IMAGE_BATCHES = loader(32)


def units(*values, shape=(4, 4), first=False, last=False):
    return Units(torch.tensor(values, dtype=torch.float64), shape, first, last)


class TestCounts:
    def test_global_by_hand(self):
        layers = [units(9, 1, 4), units(16, 2, 3, 0.5)]
        assert counts("global", layers, 3) == [2, 1]  # 16, 9, 4
        assert counts("global", layers, 5) == [2, 3]  # and 3, 2

    def test_global_keeps_one_of_each_layer(self):
        assert counts("global", [units(9, 8, 7), units(1, 2)], 3) == [2, 1]

    def test_lamp_by_hand(self):
        # Scores: 9/9, 4/13, 1/14 and 4/4, 4/8, 2/10.
        layers = [units(9, 1, 4), units(4, 4, 2)]
        assert [counts("lamp", layers, keep) for keep in range(2, 7)] == [
            [1, 1],
            [1, 2],
            [2, 2],
            [2, 3],
            [3, 3],
        ]

    def test_uniform_plus_by_hand(self):
        layers = [units(*range(10), first=True), units(*range(20)), units(*range(10), last=True)]
        assert fewest("uniform+", layers) == [10, 1, 2]
        assert counts("uniform+", layers, 25) == [10, 10, 5]
        assert counts("uniform+", layers, 14) == [10, 2, 2]

    def test_erk_by_hand(self):
        # Densities before the factor: (4 + 2 + 3 + 3) / 72 = 1/6 and (8 + 8) / 64 = 1/4.
        layers = [units(*range(72), shape=(4, 2, 3, 3)), units(*range(64), shape=(8, 8))]
        assert counts("erk", layers, 28) == [12, 16]
        # All of the second at a factor of 4, of which the first has two thirds.
        assert counts("erk", layers, 112) == [48, 64]
        assert counts("erk", layers, 124) == [60, 64]

    @pytest.mark.parametrize("method", METHODS)
    @given(data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_add_up_within_bounds_and_never_grow(self, method, data):
        sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        layers = [
            Units(
                torch.rand(n, generator=generator, dtype=torch.float64).mul(4).round(),
                (n, 3),
                i == 0,
                i == len(sizes) - 1,
            )
            for i, n in enumerate(sizes)
        ]
        low = fewest(method, layers)
        keep = data.draw(st.integers(sum(low), sum(sizes)))
        found = counts(method, layers, keep)
        assert sum(found) == keep
        assert all(a <= c <= n for a, c, n in zip(low, found, sizes, strict=True))
        if method in ("global", "lamp"):
            assert all(
                c <= m for c, m in zip(found, counts(method, layers, sum(sizes)), strict=True)
            )

    @pytest.mark.parametrize("method", ["lamp", "global"])
    @given(seed=st.integers(0, 999), keep=st.integers(3, 30))
    @settings(max_examples=40, deadline=None)
    def test_against_scores_written_out(self, method, seed, keep):
        generator = torch.Generator().manual_seed(seed)
        values = [
            torch.randn(n, generator=generator, dtype=torch.float64).square() for n in (5, 12, 13)
        ]
        scores = []
        for layer, own in enumerate(values):
            for w in own.tolist():
                above = math.fsum(v for v in own.tolist() if v >= w)
                score = w if method == "global" else w / above
                if w == max(own.tolist()):
                    score = math.inf
                scores.append((score, layer))
        chosen = [layer for _, layer in sorted(scores, reverse=True)[:keep]]
        expected = [chosen.count(layer) for layer in range(3)]
        layers = [Units(own, (len(own), 1)) for own in values]
        assert counts(method, layers, keep) == expected

    def test_refuses_a_number_that_cannot_be(self):
        layers = [units(1, 2, 3, first=True), units(1, 2)]
        with pytest.raises(ValueError, match=r"uniform\+ keeps 4 to 5 units of 2 layers, got 3"):
            counts("uniform+", layers, 3)
        with pytest.raises(ValueError, match="lamp keeps 2 to 5 units"):
            counts("lamp", layers, 6)

    def test_strongest_takes_the_lower_index_of_equals(self):
        squares = torch.tensor([1.0, 3.0, 1.0, 3.0])
        assert strongest(squares, 3).tolist() == [True, True, False, True]


@pytest.mark.usefixtures("device")
def test_neurons_are_weighed_with_all_their_incoming_weights():
    torch.manual_seed(0)
    model = settled(IMAGES["residual"](), 1, 8, 8)
    graph = trace(model, Inputs((here(images(2, 1, 8, 8)),)))
    index = graph.site("conv2").group
    found = _neurons(model, graph, graph.groups[index])
    sites = graph.groups[index].sites
    producers = dict.fromkeys(p for name in sites for p in graph.site(name).producers)
    expected = sum(
        model.get_submodule(name).weight.detach().double().flatten(1).square().sum(1)
        for name in producers
    )
    assert {"conv2", "project", "outer"} <= producers.keys()
    assert torch.allclose(found.squares, expected, rtol=1e-14)
    assert found.last
    assert not found.first


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", ["neuron", "weight"])
class TestCompress:
    def run(self, method, granularity, **options):
        torch.manual_seed(1)
        model = here(Mlp(hidden=20))
        given = {"step": 0.3, "budget": 1.0, "epochs": 1} | options
        result = compress(model, BATCHES, BATCHES, method=method, granularity=granularity, **given)
        return model, result

    def test_each_iteration_removes_a_share(self, method, granularity):
        model, result = self.run(method, granularity)
        report = result.report
        total = parameter_count(model)
        assert report.parameters[0] == total
        assert report.iterations >= 2
        weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        for number, left in enumerate(report.parameters):
            if granularity == "weight":
                expected = total - weights + round(0.7**number * weights)
                assert 0 <= expected - left <= 2
            else:
                assert left <= 0.7**number * total
        assert report.rate == total / report.parameters[report.iterations]
        assert f"{method} cannot leave" in report.stopped

    def test_the_model_is_what_the_report_says(self, method, granularity):
        _, result = self.run(method, granularity)
        last = result.report.iterations
        left = sum(int(p.count_nonzero()) for p in result.model.parameters())
        assert left == result.report.parameters[last]
        assert score(result.model, BATCHES, "test").accuracy == result.report.accuracies[last]
        assert type(result.model.first) is nn.Linear
        if granularity == "weight":
            for name, mask in result.masks.items():
                weight = result.model.get_parameter(name)
                assert torch.equal(weight != 0, mask), name
        else:
            assert not result.masks
            assert parameter_count(result.model) == left

    def test_stops_where_the_budget_is_spent(self, method, granularity):
        _, result = self.run(method, granularity, budget=0.0, accuracy=0.2, lr=1e-4)
        report = result.report
        assert report.least == 0.2
        assert min(report.accuracies[: report.iterations + 1]) >= 0.2
        if "fell" in report.stopped:
            assert report.accuracies[-1] < 0.2
            assert len(report.accuracies) == report.iterations + 2

    def test_is_the_same_twice_and_leaves_the_model_alone(self, method, granularity):
        torch.manual_seed(1)
        before = here(Mlp(hidden=20)).state_dict()
        model, first = self.run(method, granularity)
        _, second = self.run(method, granularity)
        assert first.report == second.report
        for name, value in first.model.state_dict().items():
            assert torch.equal(value, second.model.state_dict()[name]), name
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_a_teacher_is_heard(granularity):
    """Labels that never differ teach one class; the teacher's answers stand against them."""
    constant = [(x, torch.zeros_like(y)) for x, y in BATCHES]
    x = here(torch.cat([x for x, _ in BATCHES]))
    torch.manual_seed(1)
    teacher = here(Mlp(hidden=20))
    wanted = teacher(x).argmax(1)
    agreed = []
    for chosen in (None, teacher):
        torch.manual_seed(1)
        result = compress(
            here(Mlp(hidden=20)),
            constant,
            BATCHES,
            method="lamp",
            granularity=granularity,
            step=0.5,
            budget=1.0,
            epochs=10,
            lr=1e-2,
            teacher=chosen,
        )
        agreed.append((result.model(x).argmax(1) == wanted).double().mean())
    assert agreed[0] < 0.5 < 0.7 < agreed[1]


@pytest.mark.pretended
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["lenet", "residual", "padded", "depthwise", "concatenated"])
def test_neurons_of_networks_with_coupled_ones(name):
    torch.manual_seed(1)
    model = settled(IMAGES[name](), 1, 8, 8)
    result = compress(model, IMAGE_BATCHES, IMAGE_BATCHES, budget=1.0, step=0.4)
    assert result.report.iterations >= 1
    assert parameter_count(result.model) <= 0.6 * parameter_count(model)
    assert result.model(here(images(3, 1, 8, 8))).shape == (3, 4)


@pytest.mark.usefixtures("device")
def test_weights_that_modules_share_stay():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    model.extend([nn.ReLU(), nn.Linear(12, 9), nn.Linear(9, 4)])
    model[3].weight = model[1].weight
    model = here(model)
    result = compress(model, BATCHES, BATCHES, granularity="weight", budget=1.0, step=0.6)
    assert list(result.masks) == ["5.weight", "6.weight"]
    assert result.model[1].weight is result.model[3].weight
    assert result.model[1].weight.all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "best"}, r"method must be one of \['lamp', .*\], got 'best'"),
            ({"granularity": "layer"}, r"granularity must be one of .*, got 'layer'"),
            ({"step": 1.0}, r"step must lie in \(0, 1\), got 1.0"),
            ({"budget": -0.1}, r"budget must lie in \[0, 1\], got -0.1"),
            ({"accuracy": 1.5}, r"accuracy must lie in \[0, 1\], got 1.5"),
            ({"accuracy": 1.0, "budget": 0.0}, "from the start, below the 1.0000 to keep"),
            ({"epochs": 0}, "epochs must be at least 1"),
        ],
    )
    def test_say_what_was_given(self, options, message):
        torch.manual_seed(1)
        model = Mlp()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            compress(model, BATCHES, BATCHES, **options)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
