"""Budgets and plans: what they say is what restructuring does, and no group could keep more."""

import copy
import re

import pytest
import torch
from models import IMAGES, loader, settled
from rich.console import Console
from torch import nn

import neusemslice as nss
from neusemslice import Slice
from neusemslice.graph import Graph, Group, Layer, Reader, Site, Span
from neusemslice.maintain import plan
from neusemslice.maintain.budgets import by_importance, fast_step, of_contribution, ranked
from neusemslice.maintain.cost import sliced_cost
from neusemslice.maintain.search import removable
from neusemslice.report import plan_table

BATCHES = loader()


def made(name="lenet", threshold=0.8):
    torch.manual_seed(1)
    model = settled(IMAGES[name](), 1, 8, 8)
    return model, nss.slice(nss.profile(model, BATCHES), threshold=threshold)


def test_ranks_and_losses_by_hand():
    _, slicing = made("lenet")
    shares = torch.tensor([[0.5, 0.1, 0.1, 0.3], [0.0, 0.6, 0.2, 0.2]], dtype=torch.float64)
    slicing.shares["0"] = torch.cat([shares, torch.zeros(2, 4, dtype=torch.float64)])
    found = ranked(slicing, by_importance(slicing), 1)[slicing.profile.graph.site("0").group]
    assert found.order.tolist() == [1, 0, 3, 2]
    # Classes without a sample do not count; the mean of the two others.
    expected = torch.tensor([1.0, 0.65, 0.4, 0.15, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found.losses, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.65, 0.85, 1.0])
def test_groups_keep_the_fewest_neurons_for_a_share_of_the_contribution(level):
    _, slicing = made("lenet")
    groups = ranked(slicing, by_importance(slicing), 1)
    for group, count in zip(groups, of_contribution(groups, level), strict=True):
        kept = 1 - group.losses
        assert kept[count] >= level - 1e-12
        assert count == 1 or kept[count - 1] < level


def test_a_share_of_the_contribution_is_not_missed_by_rounding():
    _, slicing = made("lenet")
    slicing.shares["0"] = torch.full((4, 4), 0.25, dtype=torch.float64)
    slicing.shares["3"] = torch.full((4, 6), 1 / 6, dtype=torch.float64)
    groups = ranked(slicing, by_importance(slicing), 1)
    assert of_contribution(groups, 0.5)[:2] == (2, 3)
    assert of_contribution(groups, 5 / 6)[:2] == (4, 5)


def test_a_coupled_group_loses_what_its_most_hurt_site_loses():
    _, slicing = made("residual")
    graph = slicing.profile.graph
    found = ranked(slicing, by_importance(slicing), 1)[graph.site("conv2").group]
    assert set(found.group.sites) == {"conv2", "outer"}
    for k in range(9):
        lost = [
            float(slicing.shares[name][:, found.order[k:]].sum(1).mean())
            for name in found.group.sites
        ]
        assert abs(float(found.losses[k]) - max(lost)) < 1e-12


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize(
    "target", [{"macs": 0.6}, {"params": 0.5}, {"keep": 0.5}, {"params": 0.7, "round_to": 2}, {}]
)
def test_a_plan_is_what_restructuring_does(name, target):
    model, slicing = made(name)
    try:
        planned = plan(model, slicing, **target)
    except ValueError as error:
        reason = re.escape(str(error).removeprefix("plan"))
        with pytest.raises(ValueError, match=f"^restructure{reason}$"):
            nss.restructure(model, slicing, calibration=BATCHES, compensate=False, **target)
        return
    result = nss.restructure(model, slicing, calibration=BATCHES, compensate=False, **target)
    report = result.report
    assert planned.kept == result.kept
    assert planned.parameters == (report.before.parameters, report.after.parameters)
    assert planned.macs == (report.before.macs, report.after.macs)
    for group in planned.groups:
        for site in group.sites:
            if not group.kept_whole:
                assert report.widths[site] == (group.before, group.after)
        assert bool(group.kept_whole) == (group.sites[0] in report.kept_whole)
    # What is planned may be cut as it is.
    again = nss.restructure(model, planned.kept, calibration=BATCHES, compensate=False)
    assert again.kept == result.kept


@pytest.mark.parametrize(("name", "threshold"), [("concatenated", 0.4), ("residual", 0.65)])
def test_what_is_lost_with_critical_neurons_that_are_not_the_most_important(name, threshold):
    model, slicing = made(name, threshold)
    planned = plan(model, slicing)
    for group in planned.groups:
        gone = [
            float(slicing.shares[site][:, ~planned.kept.mask(site)].sum(1).mean())
            for site in group.sites
        ]
        assert abs(group.lost - max(gone)) < 1e-12


def test_each_groups_own_savings():
    model, slicing = made("residual")
    planned = plan(model, slicing, keep=0.5)
    graph = slicing.profile.graph
    for group in planned.groups:
        masks = Slice.whole(graph).masks()
        masks |= {name: planned.kept.mask(name) for name in group.sites}
        alone = nss.restructure(
            model, Slice(graph, masks), calibration=BATCHES, compensate=False
        ).report
        assert group.parameters == alone.before.parameters - alone.after.parameters
        assert group.macs == alone.before.macs - alone.after.macs


@pytest.mark.parametrize("name", ["lenet", "residual", "depthwise", "concatenated"])
@pytest.mark.parametrize("target", [0.35, 0.5, 0.8])
@pytest.mark.parametrize("round_to", [1, 2])
def test_no_group_could_keep_a_step_more(name, target, round_to):
    model, slicing = made(name)
    planned = plan(model, slicing, params=target, round_to=round_to)
    graph = slicing.profile.graph
    limit = target * planned.parameters[0]
    assert planned.parameters[1] <= limit
    for group, entry in zip(
        planned.groups, ranked(slicing, by_importance(slicing), 1), strict=True
    ):
        more = min(group.before, group.after + round_to)
        if more == group.after:
            continue
        mask = torch.zeros(group.before, dtype=torch.bool)
        mask[entry.order[:more]] = True
        masks = planned.kept.masks() | dict.fromkeys(group.sites, mask)
        assert sliced_cost(model, graph, removable(Slice(graph, masks), "plan"))[0] > limit, (
            group.sites
        )


class Wide(nn.Sequential):
    """Convolutions wide enough to be kept fast, and one that is not."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 12, 3),
            nn.ReLU(),
            nn.Conv2d(12, 20, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(80, 4),
        )


class TestFastWidths:
    def made(self):
        torch.manual_seed(1)
        model = Wide()
        return model, nss.slice(nss.profile(model, BATCHES))

    def widths(self, **target):
        model, slicing = self.made()
        return [group.after for group in plan(model, slicing, **target).groups]

    def test_are_kept_where_speed_is_the_target(self):
        widths = self.widths(macs=0.6)
        assert widths[0] % 8 == 0
        assert widths[2] in (8, 16, 20)
        assert widths[1] < 12

    def test_are_not_kept_otherwise(self):
        assert any(w % 8 for w in self.widths(params=0.6)[::2])
        assert self.widths(keep=0.3) == [10, 4, 6]
        assert any(w % 8 for w in self.widths(macs=0.6, round_to=1)[::2])

    def test_give_way_to_a_target_that_they_do_not_meet(self):
        assert self.widths(macs=0.02)[0] < 8

    def test_heads_and_experts_have_their_own(self):
        def step(neurons, repeat, layers):
            span = Span("layer.weight", 0, 0, repeat)
            reader = (Reader("other", -1),)
            site = Site("layer", neurons, 0, ("layer",), reader, (span,), ())
            graph = Graph("0" * 32, 4, (site,), (Group(("layer",)),), layers, ("other",), {})
            return fast_step(graph, graph.groups[0])

        layers = (Layer("layer", 4, 64, 256, False),)
        assert [step(n, 1, layers) for n in (8, 15, 16, 64)] == [1, 1, 8, 8]
        assert [step(32, repeat, layers) for repeat in (4, 64)] == [2, 1]
        assert step(64, 1, ()) == 1


def test_needs_no_weights():
    model, slicing = made("residual")
    empty = copy.deepcopy(model).to("meta")
    assert plan(empty, slicing, macs=0.5).kept == plan(model, slicing, macs=0.5).kept
    # Nothing is ranked without a target.
    assert plan(empty, slicing, calibration=BATCHES).kept == plan(model, slicing).kept


def test_is_shown_as_a_table():
    model, slicing = made("padded")
    planned = plan(model, slicing, keep=0.5)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_table(planned))
    text = console.export_text()
    assert "conv1" in text
    assert "all" in text
    assert f"{planned.parameters[1]:,} = " in text


def test_refusals():
    model, slicing = made()
    with pytest.raises(ValueError, match=r"plan: give one target, got \['keep', 'macs'\]"):
        plan(model, slicing, macs=0.5, keep=0.5)
    with pytest.raises(ValueError, match=r"plan: params must lie in \(0, 1\], got 0"):
        plan(model, slicing, params=0)
    with pytest.raises(ValueError, match="plan: round_to must be at least 1, got 0"):
        plan(model, slicing, keep=0.5, round_to=0)
    with pytest.raises(ValueError, match="belongs to another model"):
        plan(torch.nn.Linear(3, 3), slicing, keep=0.5)
