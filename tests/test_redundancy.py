"""Redundancy: the greedy order against least squares, its laws, and what it saves a network."""

import itertools
import re

import pytest
import torch
from helpers import num_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from models import IMAGES, Reused, images, loader, settled
from torch import Tensor, nn
from transformer_models import batches, transformer

import neusemslice as nss
from neusemslice import Slice
from neusemslice.graph import Inputs
from neusemslice.maintain import compensate, folding, plan, redundancy
from neusemslice.maintain.budgets import by_importance, importance_of
from neusemslice.maintain.redundancy import Correlated, by_redundancy, order

X = images(160, 1, 8, 8, seed=3)
CALIBRATION = [(x, torch.arange(len(x)) % 4) for x in X.split(40)]


def made(name: str) -> tuple[nn.Module, nss.SemanticSlicing]:
    torch.manual_seed(1)
    model = settled(IMAGES[name](), 1, 8, 8)
    return model, sliced(model, CALIBRATION)


def sliced(model: nn.Module, data: list) -> nss.SemanticSlicing:
    """A slicing in which neurons are about equally important, so that redundancy decides."""
    slicing = nss.slice(nss.profile(model, data))
    for name, p in slicing.shares.items():
        slicing.shares[name] = (p + 100).div(100 * len(p[0]) + 1)
    return slicing


def activations(seed: int, neurons: int, each: int = 1, rows: int = 400) -> tuple[Tensor, Tensor]:
    """Importance ``[n]`` and correlated activations ``[rows, n * each]`` far from zero."""
    g = torch.Generator().manual_seed(seed)
    features = neurons * each
    x = torch.randn(rows, features // 2, generator=g) @ torch.randn(
        features // 2, features, generator=g
    )
    x = torch.relu(x + torch.randn(rows, features, generator=g)) + torch.randn(
        features, generator=g
    )
    return 0.1 + torch.rand(neurons, generator=g).double(), x.double()


def found(importance: Tensor, *xs: Tensor, each: int = 1) -> list[int]:
    return order(importance, [Correlated.of(covariance(x), each) for x in xs]).tolist()


def covariance(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return x.t() @ x


def residual(x: Tensor, neuron: int, others: list[int], each: int) -> float:
    """By least squares, a constant among what explains."""
    parts = x.unflatten(1, (-1, each))
    own = parts[:, neuron]
    given_ = torch.cat([torch.ones(len(x), 1).double(), parts[:, others].flatten(1)], 1)
    left = own - given_ @ torch.linalg.lstsq(given_, own).solution
    variance = float((own - own.mean(0)).square().sum())
    return float(left.square().sum()) / variance if variance > 1e-20 else 0.0


def expected(importance: Tensor, *xs: Tensor, each: int = 1) -> list[int]:
    """Each time that goes which loses least, by a least squares problem for each candidate."""
    left, went = list(range(len(importance))), []
    while left:
        lost = {}
        for neuron in left:
            others = [j for j in left if j != neuron]
            share = max(residual(x, neuron, others, each) for x in xs)
            lost[neuron] = float(importance[neuron]) * share**0.5
        went.append(min(left, key=lambda j: (lost[j], float(importance[j]), -j)))
        left.remove(went[-1])
    return went[::-1]


class TestOracle:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize(("neurons", "each"), [(9, 1), (2, 1), (1, 1), (5, 3)])
    def test_least_squares(self, seed, neurons, each):
        importance, x = activations(seed, neurons, each)
        shares = Correlated.of(covariance(x), each).residuals()
        for j in range(neurons):
            others = [i for i in range(neurons) if i != j]
            assert abs(float(shares[j]) - residual(x, j, others, each)) < 1e-4
        assert found(importance, x, each=each) == expected(importance, x, each=each)

    def test_of_several_places_the_greatest_residual_counts(self):
        importance, x = activations(0, 7)
        _, y = activations(1, 7)
        assert found(importance, x, y) == expected(importance, x, y)
        assert found(importance, x, y) != found(importance, x)

    def test_without_correlations_importance_ranks(self):
        x = torch.eye(8).double()
        x = torch.cat([x, -x])
        importance = torch.tensor([0.2, 0.5, 0.2, 0.1, 0.5, 0.0, 0.2, 0.0]).double()
        expected = importance.sort(descending=True, stable=True).indices.tolist()
        assert found(importance, x) == expected

    def test_many_neurons_of_few_dimensions(self):
        """The rounding of their Gram is above the ridge at first."""
        g = torch.Generator().manual_seed(0)
        x = torch.randn(600, 2, generator=g) @ torch.randn(2, 400, generator=g)
        gram = nss.ops.Gram.empty(400)
        nss.ops.gram_(gram, x)
        place = Correlated.of(gram.products)
        assert place.ridge > redundancy.RIDGE
        assert (place.residuals() < 1e-4).all()
        last = order(torch.ones(400).double(), [place])
        assert sorted(last.tolist()) == list(range(400))
        assert torch.linalg.matrix_rank(x[:, last[:2]].double()) == 2


class TestLaws:
    @settings(deadline=None, max_examples=30)
    @given(seed=st.integers(0, 10**6))
    def test_neither_scale_nor_order_of_neurons_matters(self, seed):
        importance, x = activations(seed, 12)
        g = torch.Generator().manual_seed(seed)
        scale = torch.logspace(-6, 6, 12).double()[torch.randperm(12, generator=g)]
        before = found(importance, x)
        assert found(importance, x * scale - 3) == before
        moved = torch.randperm(12, generator=g)
        assert moved[found(importance[moved], x[:, moved])].tolist() == before

    @settings(deadline=None, max_examples=30)
    @given(seed=st.integers(0, 10**6), copied=st.integers(0, 8))
    def test_of_two_that_are_the_same_one_goes_first_and_the_other_counts_as_alone(
        self, seed, copied
    ):
        importance, x = activations(seed, 9)
        twice = torch.cat([x, 2 * x[:, copied : copied + 1]], 1)
        weights = torch.cat([importance, importance[copied : copied + 1]])
        after = found(weights, twice)
        assert after.pop() == 9  # of equal ones the last goes first
        assert after == found(importance, x)

    @pytest.mark.parametrize("value", [0.0, 1e3])
    def test_a_neuron_that_never_changes_goes_first(self, value):
        importance, x = activations(0, 8)
        x[:, 5] = value
        importance[5] = 10.0
        gram = nss.ops.Gram.empty(8)
        nss.ops.gram_(gram, x.float())
        covariance = gram.products + 0.0
        rounding = redundancy._CONSTANT * gram.count * gram.mean.square()
        found = order(importance, [Correlated.of(covariance, 1, rounding)]).tolist()
        assert found[-1] == 5
        others = [j for j in range(8) if j != 5]
        expected = order(importance[others], [Correlated.of(gram.products[others][:, others])])
        assert found[:-1] == [others[j] for j in expected.tolist()]

    @pytest.mark.parametrize("each", [1, 4])
    def test_many_at_once_are_as_one_by_one(self, each, monkeypatch):
        """Of 90 neurons, 30 repeat others with some noise."""
        importance, x = activations(2, 60, each, rows=1200)
        again = x[:, : 30 * each] + 0.1 * torch.randn(1200, 30 * each).double()
        x = torch.cat([x, again], 1)
        importance = torch.cat([importance, importance[:30]])
        singly = found(importance, x, each=each)
        monkeypatch.setattr(redundancy, "SINGLY", 16)
        assert found(importance, x, each=each) == singly

    def test_duplicates_do_not_go_together(self, monkeypatch):
        """All of them are nearest to going until one of each kind has gone."""
        importance, x = activations(3, 40)
        monkeypatch.setattr(redundancy, "SINGLY", 8)
        kept = found(torch.cat([importance, importance]), torch.cat([x, x], 1))[:40]
        assert sorted(j % 40 for j in kept) == list(range(40))

    def test_threads_do_not_matter(self, monkeypatch):
        importance, x = activations(4, 150)
        importance, x = torch.cat([importance, importance]), torch.cat([x, x], 1)
        for singly in (512, 16):
            monkeypatch.setattr(redundancy, "SINGLY", singly)
            with num_threads(1):
                one = found(importance, x)
            with num_threads(2):
                assert found(importance, x) == one


def read(model: nn.Module, module: str, data: list) -> Tensor:
    """What a module reads, float64, batch by batch."""
    seen: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].double())
    )
    with torch.no_grad():
        for batch in data:
            inputs = (
                {k: v for k, v in batch.items() if k != "labels"}
                if isinstance(batch, dict)
                else batch[0]
            )
            Inputs(kwargs=inputs).run(model) if isinstance(batch, dict) else model(inputs)
    hook.remove()
    return torch.cat(seen)


class TestModels:
    def check(self, model, slicing, data, site, *xs, each=1):
        graph = slicing.profile.graph
        group = graph.site(site).group
        importance = importance_of(slicing, graph.groups[group])
        orders = by_redundancy(model, slicing, data, "plan")
        assert orders[group].dtype == torch.int64
        assert orders[group].tolist() == expected(importance, *xs, each=each)
        if len(importance) > 4:
            assert not torch.equal(orders[group], by_importance(slicing)[group])

    @pytest.mark.parametrize(
        ("name", "site", "readers"),
        [
            ("lenet", "0", ["3"]),
            ("lenet", "7", ["9"]),
            ("residual", "stem", ["conv1"]),
            ("residual", "inner", ["outer"]),
            ("residual", "conv2", ["inner", "head"]),
            ("concatenated", "left", ["right"]),
            ("depthwise", "expand", ["project"]),
        ],
    )
    def test_activations_are_those_that_are_read(self, name, site, readers):
        model, slicing = made(name)
        xs = [read(model, reader, CALIBRATION) for reader in readers]
        rows = [x.movedim(1, -1).flatten(0, -2) for x in xs]
        self.check(model, slicing, CALIBRATION, site, *rows)

    def test_a_range_of_what_is_read(self):
        model, slicing = made("concatenated")
        x = read(model, "join", CALIBRATION)[:, 4:]
        self.check(model, slicing, CALIBRATION, "right", x.movedim(1, -1).flatten(0, -2))

    def test_pixels_of_a_flattened_image_are_positions(self):
        model, slicing = made("lenet")
        x = read(model, "7", CALIBRATION).unflatten(1, (6, 16)).movedim(1, -1)
        self.check(model, slicing, CALIBRATION, "3", x.flatten(0, 1))

    @pytest.mark.parametrize("name", ["llama", "bert"])
    def test_real_tokens_of_a_text_with_heads_of_several_features(self, name):
        model, data = transformer(name), batches(name, 12)
        slicing = sliced(model, data)
        mask = torch.cat([batch["attention_mask"] for batch in data]).bool()
        each = {s.name: s for s in slicing.profile.graph.sites}
        checked = set()
        for site in each.values():
            if slicing.profile.graph.groups[site.group].kept_whole:
                continue
            reader = site.readers[0]
            x = read(model, reader.module, data)
            x = x[mask] if x.ndim == 3 else x
            self.check(model, slicing, data, site.name, x, each=reader.repeat)
            checked.add(reader.repeat)
        assert checked == ({1, 8} if name == "llama" else {1, 4})

    def test_what_cannot_be_folded_is_ranked_by_importance(self):
        for name in ("padded", "grouped"):
            model, slicing = made(name)
            orders = by_redundancy(model, slicing, CALIBRATION, "plan")
            for group, own, other in zip(
                slicing.profile.graph.groups, orders, by_importance(slicing), strict=True
            ):
                if group.kept_whole:
                    assert torch.equal(own, other)
        model = settled(Reused(), 12)
        data = loader(shape=(12,))
        slicing = nss.slice(nss.profile(model, data))
        fewer = [(x[:1], y[:1]) for x, y in data]  # 4 rows of 8 features
        for one, other in zip(
            by_redundancy(model, slicing, fewer, "plan"), by_importance(slicing), strict=True
        ):
            assert torch.equal(one, other)
        model, data = transformer("mixtral"), batches("mixtral")
        slicing = nss.slice(nss.profile(model, data))
        graph = slicing.profile.graph
        orders, others = by_redundancy(model, slicing, data, "plan"), by_importance(slicing)
        experts = [i for i, group in enumerate(graph.groups) if group.least > 1]
        assert experts
        for i in experts:
            assert torch.equal(orders[i], others[i])

    def test_several_sweeps_find_what_one_does(self, monkeypatch):
        model, slicing = made("residual")
        sweeps = itertools.count()

        class Counted(list):
            def __iter__(self):
                next(sweeps)
                return super().__iter__()

        once = by_redundancy(model, slicing, CALIBRATION, "plan")
        by_redundancy(model, slicing, Counted(CALIBRATION), "plan")
        before = next(sweeps)
        monkeypatch.setattr(folding, "TOGETHER", 1)
        again = by_redundancy(model, slicing, Counted(CALIBRATION), "plan")
        assert next(sweeps) - before - 1 == before + 3  # four groups of their own
        for one, other in zip(once, again, strict=True):
            assert torch.equal(one, other)

    @pytest.mark.pretended
    @pytest.mark.usefixtures("device")
    def test_the_model_is_left_as_it_was(self):
        model, slicing = made("lenet")
        model.train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        by_redundancy(model, slicing, CALIBRATION, "plan")
        assert model.training
        assert not any(module._forward_pre_hooks for module in model.modules())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("target", [{"macs": 0.6}, {"params": 0.5, "round_to": 2}, {"keep": 0.5}])
def test_a_plan_with_calibration_is_what_restructuring_keeps(name, target):
    model, slicing = made(name)
    try:
        planned = plan(model, slicing, calibration=CALIBRATION, **target)
    except ValueError as error:
        reason = re.escape(str(error).removeprefix("plan"))
        with pytest.raises(ValueError, match=f"^restructure{reason}$"):
            nss.restructure(model, slicing, calibration=CALIBRATION, **target)
        return
    result = nss.restructure(model, slicing, calibration=CALIBRATION, **target)
    assert planned.kept == result.kept
    orders = by_redundancy(model, slicing, CALIBRATION, "plan")
    for group, order_ in zip(planned.groups, orders, strict=True):
        kept = planned.kept.mask(group.sites[0]).nonzero().squeeze(1)
        if not group.kept_whole:
            assert set(kept.tolist()) == set(order_[: group.after].tolist())
            # What is lost is the share of those that go.
            lost = [
                float(slicing.shares[site][:, order_[group.after :]].sum(1).mean())
                for site in group.sites
            ]
            assert abs(group.lost - max(lost)) < 1e-12


class Copies(nn.Sequential):
    """Six neurons of twelve: each of the three weighty ones is there three times over."""

    KINDS = (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 5)

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU())
        self.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(8, 4))
        with torch.no_grad():
            self[0].weight.copy_(self[0].weight[: len(self.KINDS)][list(self.KINDS)])
            self[0].bias.copy_(0.3 + self[0].bias[list(self.KINDS)])
            self[2].weight[:, 9:] *= 0.5


def test_copies_are_given_up_before_what_is_there_once(monkeypatch):
    """Importance alone keeps copies, and cuts neurons whose like there is no more."""
    # Without the pull towards the old weights, folding what is linear is exact.
    monkeypatch.setattr(compensate, "RIDGE", 1e-10)
    model = Copies().eval()
    slicing = nss.slice(nss.profile(model, CALIBRATION))
    whole = Slice.whole(slicing.profile.graph).masks()
    unseen = images(64, 1, 8, 8, seed=9)
    kinds, errors = [], []
    for calibration in (CALIBRATION, None):
        kept = plan(model, slicing, calibration=calibration, keep=0.5).kept.mask("0")
        kinds.append({kind for kind, left in zip(Copies.KINDS, kept.tolist(), strict=True) if left})
        first = Slice(slicing.profile.graph, whole | {"0": kept})
        small = nss.restructure(model, first, calibration=CALIBRATION).model
        with torch.no_grad():
            errors.append(float((small(unseen) - model(unseen)).abs().max()))
    assert kinds[0] == set(Copies.KINDS)
    assert kinds[1] != set(Copies.KINDS)
    assert errors[0] < 1e-6
    assert errors[1] > 1e-3


class TestRefusals:
    def test_an_iterator(self):
        model, slicing = made("lenet")
        with pytest.raises(ValueError, match=r"plan: .* an iterator is used up after one"):
            plan(model, slicing, calibration=iter(CALIBRATION), keep=0.5)

    def test_the_meta_device(self):
        model, slicing = made("lenet")
        with pytest.raises(
            ValueError, match="plan: a model on the meta device cannot run the calibration"
        ):
            plan(model.to("meta"), slicing, calibration=CALIBRATION, keep=0.5)

    def test_activations_that_are_not_finite_name_the_layer(self):
        model, slicing = made("lenet")
        bad = X.clone()
        bad[40] = torch.nan
        with pytest.raises(ValueError, match="plan: layer 3 sees activations that are not finite"):
            plan(model, slicing, calibration=list(bad.split(40)), keep=0.5)
