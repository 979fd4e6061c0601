"""Sensitivity as measured: answers that change, in float64 by hand, and budgets from them."""

import itertools

import pytest
import torch
from helpers import num_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from models import IMAGES, images, settled
from rich.console import Console
from torch import Tensor, nn
from transformer_models import batches, transformer

import neusemslice as nss
from neusemslice import Slice
from neusemslice.graph import Inputs, evaluation
from neusemslice.maintain import plan, sensitivity
from neusemslice.maintain.budgets import by_importance, kept_slice, of_change, ranked
from neusemslice.maintain.compensate import RIDGE
from neusemslice.maintain.cost import sliced_cost
from neusemslice.maintain.folding import foldable
from neusemslice.maintain.search import largest
from neusemslice.maintain.sensitivity import answer_changes, curve
from neusemslice.maintain.targets import ordered
from neusemslice.report import plan_table

X = images(160, 1, 8, 8, seed=3)
CALIBRATION = [(x, torch.arange(len(x)) % 4) for x in X.split(40)]


def made(name: str) -> tuple[nn.Module, nss.SemanticSlicing]:
    torch.manual_seed(1)
    model = settled(IMAGES[name](), 1, 8, 8)
    return model, nss.slice(nss.profile(model, CALIBRATION))


def changes_of(name: str) -> tuple[nn.Module, nss.SemanticSlicing, list[Tensor], list[Tensor]]:
    model, slicing = made(name)
    orders = ordered(model, slicing, CALIBRATION, "plan")
    found = answer_changes(model, slicing.profile.graph, orders, CALIBRATION, "plan")
    return model, slicing, orders, found


def by_hand(before: Tensor, rest: nn.Module, order: Tensor, count: int) -> float:
    """Rows ``[N, C, P]`` are what is read; the others are estimated by ridge regression."""
    kept, gone = order[:count], order[count:]
    rows = before.double().movedim(1, -1).flatten(0, -2)
    x = rows - rows.mean(0)
    own = x[:, kept]
    penalty = RIDGE * own.square().sum(0).mean()
    weight = torch.linalg.lstsq(
        torch.cat([own, penalty.sqrt() * torch.eye(count, dtype=torch.float64)]),
        torch.cat([x[:, gone], torch.zeros(count, len(gone), dtype=torch.float64)]),
    ).solution
    estimate = before.double().movedim(1, -1).clone()
    estimate[..., gone] = (own @ weight + rows.mean(0)[gone]).view(*estimate.shape[:-1], len(gone))
    whole, cut = rest(before.double()), rest(estimate.movedim(-1, 1))
    return float((cut - whole).square().sum() / (whole - whole.mean(0)).square().sum())


class TestOracle:
    @pytest.mark.parametrize("site", ["0", "3", "7"])
    def test_least_squares(self, site, monkeypatch):
        monkeypatch.setattr(sensitivity, "SAMPLES", 1000)
        model, slicing, orders, found = changes_of("lenet")
        index = slicing.profile.graph.site(site).group
        at = {"0": 3, "3": 7, "7": 9}[site]
        with torch.no_grad():
            before = model[:at](X)
            if site == "3":  # flattened: 16 positions next to each other
                before = before.unflatten(1, (6, 16))
            rest = model.double()[at:]
            shaped = nn.Sequential(nn.Flatten(), *rest) if site == "3" else rest
            order = orders[index]
            for level in sensitivity.LEVELS:
                count = max(1, -int(-level * len(order) // 1))
                expected = by_hand(before, shaped, order, count)
                assert float(found[index][count]) == pytest.approx(expected, rel=1e-4)

    def test_what_cannot_be_folded_is_0(self):
        model, data = transformer("mixtral"), batches("mixtral")
        slicing = nss.slice(nss.profile(model, data))
        graph = slicing.profile.graph
        orders = by_importance(slicing)
        found = answer_changes(model, graph, orders, data, "plan")
        experts = [i for i, group in enumerate(graph.groups) if group.least > 1]
        assert experts
        answers, masks = [], [batch["attention_mask"].bool() for batch in data]
        kept = Slice.whole(graph).masks()
        i = experts[0]
        count = graph.groups[i].least
        mask = torch.zeros(len(orders[i]), dtype=torch.bool)
        mask[orders[i][:count]] = True
        cut = Slice(graph, kept | dict.fromkeys(graph.groups[i].sites, mask))
        for part in (Slice.whole(graph), cut):
            with torch.no_grad(), evaluation(model), part.applied(model):
                rows = []
                for batch, real in zip(data, masks, strict=True):
                    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
                    rows.append((logits[real] if logits.ndim == 3 else logits).double())
                answers.append(torch.cat(rows))
        whole, changed = answers
        expected = (changed - whole).square().sum() / (whole - whole.mean(0)).square().sum()
        assert float(found[i][count]) == pytest.approx(float(expected), rel=1e-4)

    def test_copies_cost_nothing(self):
        model, _ = made("lenet")
        with torch.no_grad():  # neurons 2 and 3 of the first layer are as 0 and 1
            model[0].weight[2:].copy_(model[0].weight[:2])
            model[0].bias[2:].copy_(model[0].bias[:2])
        slicing = nss.slice(nss.profile(model, CALIBRATION))
        index = slicing.profile.graph.site("0").group
        orders = ordered(model, slicing, CALIBRATION, "plan")
        found = answer_changes(model, slicing.profile.graph, orders, CALIBRATION, "plan")[index]
        assert float(found[2]) < 1e-5
        assert float(found[1]) > 1e-3


class TestWhereItIsRead:
    @pytest.mark.parametrize("name", [*sorted({*IMAGES} - {"grouped"}), "llama", "bert", "gpt2"])
    def test_writing_what_was_read_changes_nothing(self, name):
        if name in IMAGES:
            model, data = made(name)[0], CALIBRATION
            inputs = Inputs((X[:3],))
        else:
            model, data = transformer(name), batches(name)
            inputs = Inputs(kwargs={k: v for k, v in data[0].items() if k != "labels"})
        graph = nss.profile(model, data).graph
        with torch.no_grad(), evaluation(model):
            read = foldable(model, graph, data, "plan")
            places = {place for sites in read.values() for own in sites for place in own}
            assert places
            seen = {}

            def hook(place):
                def keep(module, args, kwargs):
                    seen[place] = (args[0] if args else kwargs["input"]).clone()

                return keep

            for place in places:
                module = model.get_submodule(place.reader.module)
                module.register_forward_pre_hook(hook(place), with_kwargs=True)
            inputs.run(model)
        for place, x in seen.items():
            rows = place.rows(x, None)
            assert torch.equal(place.written(x, rows), x)
            other = place.written(x, rows + 1)
            assert torch.equal(place.rows(other, None), rows + 1)
            assert int((other != x).sum()) == rows.numel()

    def test_the_model_is_left_as_it_was(self):
        model, _ = made("residual")
        model.train()
        before = {name: t.clone() for name, t in model.state_dict().items()}
        slicing = nss.slice(nss.profile(model, CALIBRATION))
        answer_changes(model, slicing.profile.graph, by_importance(slicing), CALIBRATION, "plan")
        assert model.training
        assert not any(m._forward_pre_hooks for m in model.modules())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])


class TestCurve:
    def test_by_hand(self):
        found = curve(8, [1, 2, 4, 6], [1.0, 0.25, 0.0625, 0.03125])
        expected = [4.0, 1.0, 0.25, 0.125, 0.0625, 0.0625 / 2**0.5, 0.03125, 0.015625, 0.0]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))

    @given(
        st.integers(2, 40).flatmap(
            lambda n: st.tuples(
                st.just(n),
                st.lists(st.integers(1, n - 1), min_size=1, max_size=5, unique=True).map(sorted),
            )
        ),
        st.lists(st.floats(0, 1e6), min_size=5, max_size=5),
    )
    @settings(max_examples=60, deadline=None)
    def test_never_rises_and_ends_at_0(self, sizes, values):
        neurons, counts = sizes
        values = sorted(values[: len(counts)], reverse=True)
        found = curve(neurons, counts, values)
        assert len(found) == neurons + 1
        assert bool(found.isfinite().all())
        assert bool((found[1:] <= found[:-1] * (1 + 1e-12)).all())
        assert float(found[-1]) == 0
        for count, value in zip(counts, values, strict=True):
            assert float(found[count]) == pytest.approx(value, rel=1e-9, abs=1e-300)

    def test_what_rises_is_chance(self):
        found = curve(4, [1, 2, 3], [0.1, 0.5, 0.2])
        assert found[1:].tolist() == pytest.approx([0.5, 0.5, 0.2, 0.0])

    def test_one_neuron_has_none(self):
        assert curve(1, [], []).tolist() == [0.0, 0.0]


class TestBudgets:
    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_each_group_keeps_what_is_worth_its_price(self, step):
        _, slicing, orders, changes = changes_of("lenet")
        groups = ranked(slicing, orders, step)
        prices = [0.01 * (i + 1) for i in range(len(groups))]
        last = of_change(groups, changes, prices, 0.0)
        assert last == tuple(
            group.neurons if group.group.kept_whole else min(group.neurons, step)
            for group in groups
        )
        for level in (0.1, 0.5, 0.9, 0.99, 1.0):
            numbers = of_change(groups, changes, prices, level)
            rate = (1 - level) / level
            for group, change, price, number, before in zip(
                groups, changes, prices, numbers, last, strict=True
            ):
                assert number >= before
                assert number == group.neurons or number % step == 0
                if not group.group.kept_whole:
                    own = float(change[number]) + rate * price * number
                    for other in range(step, group.neurons, step):
                        assert own <= float(change[other]) + rate * price * other + 1e-12
            last = numbers
        assert all(float(change[n]) == 0 for change, n in zip(changes, last, strict=True))

    @pytest.mark.parametrize("name", ["lenet", "residual", "concatenated"])
    @pytest.mark.parametrize("part", ["params", "macs"])
    @pytest.mark.parametrize("target", [0.3, 0.6])
    def test_answers_change_less_than_with_equal_shares(self, name, part, target):
        model, slicing, orders, changes = changes_of(name)
        groups = ranked(slicing, orders, 1)
        totals = []
        for measured in (changes, None):
            kept = largest(model, slicing.profile.graph, groups, measured, part, target, "plan")
            numbers = [int(kept.mask(group.group.sites[0]).sum()) for group in groups]
            totals.append(sum(float(c[n]) for c, n in zip(changes, numbers, strict=True)))
        assert totals[0] <= totals[1]

    def test_the_least_of_all_that_fit(self):
        """Against every choice there is; prices are linear where costs are not."""
        model, slicing, orders, changes = changes_of("lenet")
        graph = slicing.profile.graph
        groups = ranked(slicing, orders, 1)
        sizes = [range(1, g.neurons + 1) if not g.group.kept_whole else [g.neurons] for g in groups]
        whole = sliced_cost(model, graph, Slice.whole(graph))[0]

        def total(numbers):
            return sum(float(c[n]) for c, n in zip(changes, numbers, strict=True))

        fitting = [
            total(n)
            for n in itertools.product(*sizes)
            if sliced_cost(model, graph, kept_slice(graph, groups, n))[0] <= 0.5 * whole
        ]
        found = plan(model, slicing, calibration=CALIBRATION, params=0.5)
        own = total([group.after for group in found.groups])
        assert min(fitting) <= own <= 1.1 * min(fitting)

    def test_without_calibration_the_profile_decides(self):
        model, slicing, _, _ = changes_of("lenet")
        planned = plan(model, slicing, params=0.5)
        assert all(group.changes is None for group in planned.groups)
        groups = ranked(slicing, by_importance(slicing), 1)
        wanted = largest(model, slicing.profile.graph, groups, None, "params", 0.5, "plan")
        assert planned.kept == wanted

    def test_a_plan_shows_what_was_measured(self):
        model, slicing, _, changes = changes_of("lenet")
        planned = plan(model, slicing, calibration=CALIBRATION, macs=0.5)
        for group, change in zip(planned.groups, changes, strict=True):
            torch.testing.assert_close(group.changes, change)
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(plan_table(planned))
        assert "answers change at 70% / 50% / 30%" in console.export_text()
        share = plan(model, slicing, calibration=CALIBRATION, keep=0.5)
        assert all(group.changes is None for group in share.groups)

    def test_threads_do_not_matter(self):
        kept = []
        for threads in (1, 2):
            with num_threads(threads):
                model, slicing = made("residual")
                kept.append(plan(model, slicing, calibration=CALIBRATION, macs=0.5).kept)
        assert kept[0] == kept[1]


class TestRefusals:
    def test_an_iterator(self):
        model, slicing = made("lenet")
        with pytest.raises(ValueError, match=r"plan: .* an iterator is used up after one"):
            answer_changes(
                model, slicing.profile.graph, by_importance(slicing), iter(CALIBRATION), "plan"
            )
