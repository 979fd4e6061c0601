"""How much room is left, what a new task is expected to need, and what a capacity costs."""

import math

import pytest
import torch
from models import IMAGES, loader, settled

import neusemslice as nss
from neusemslice.maintain import capacity_left
from neusemslice.report import capacity_table

pytestmark = pytest.mark.usefixtures("device")

OLD = loader(96)


def made(name="residual"):
    model = settled(IMAGES[name](), 1, 8, 8)
    return model, nss.slice(nss.profile(model, OLD), threshold=0.6)


class TestLeft:
    def test_classes_like_old_ones_are_reused(self):
        model, slicing = made()
        same = capacity_left(model, slicing, [(x, y + 4) for x, y in OLD], 0.5)
        assert list(same.reuse) == [4, 5, 6, 7]
        assert min(same.reuse.values()) > 0.99
        other = capacity_left(model, slicing, [(-4 * x, y + 4) for x, y in OLD], 0.5)
        assert max(other.reuse.values()) < min(same.reuse.values())
        assert other.expected > same.expected

    def test_the_estimate_by_hand(self):
        model, slicing = made("lenet")
        new = [(1.3 - x, y % 2 + 4) for x, y in OLD]
        found = capacity_left(model, slicing, new, 0.5)
        anew = 2 - sum(found.reuse.values())
        for site in found.sites:
            critical = int(slicing.critical[site.site].any(0).sum())
            assert site.expected == min(site.neurons, math.ceil(anew * critical / 4))
            assert site.free == site.neurons // 2
        assert found.free == sum(site.free for site in found.sites)
        assert f"{found.free} of 16 neurons are free" in str(found)
        assert capacity_table(found).row_count == 2

    @pytest.mark.pretended
    def test_of_a_task_set(self):
        model, slicing = made("lenet")
        new = [(1.3 - x, y + 4) for x, y in OLD]
        result = nss.extend(model, slicing, new, capacity=0.5, reserve=0.5, epochs=1)
        later = [(x, y + 4) for x, y in new]
        found = capacity_left(result.model, slicing, later)
        assert {s.site: (s.neurons, s.free) for s in found.sites} == result.report.left
        assert found.free == len(result.model.free)

    def test_refusals(self):
        model, slicing = made()
        with pytest.raises(ValueError, match="belongs to another model"):
            capacity_left(IMAGES["lenet"](), slicing, OLD)
        with (
            pytest.raises(ValueError, match="NaN or infinite activations"),
            pytest.warns(RuntimeWarning, match="were left out"),
        ):
            capacity_left(model, slicing, [(x * torch.nan, y + 4) for x, y in OLD])


class TestCurve:
    @pytest.mark.pretended
    def test_compensation_is_seen(self):
        model, slicing = made()
        curve = nss.capacity_curve(
            model, slicing, OLD, calibration=OLD, capacities=(0.75, 0.25, 0.5)
        )
        assert curve.capacities == (0.25, 0.5, 0.75)
        assert (curve.free.diff() > 0).all()
        assert curve.masked.shape == curve.compensated.shape == (3,)
        for capacity, free in zip(curve.capacities, curve.free.tolist(), strict=True):
            new = [(x, y + 4) for x, y in OLD]
            result = nss.extend(model, slicing, new, capacity=capacity, epochs=1)
            assert (~result.frozen).density == pytest.approx(free)
        assert nss.capacity_curve(model, slicing, OLD, capacities=(0.5,)).compensated is None

    def test_the_largest_that_is_good_enough(self):
        curve = nss.CapacityCurve(
            (0.2, 0.4, 0.6),
            *torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.7, 0.5], [0.9, 0.875, 0.6]]).double(),
            0.875,
        )
        assert curve.largest(0.03) == 0.4
        assert curve.largest(-0.01) == 0.2
        assert curve.largest(-0.1) is None

    @pytest.mark.parametrize("bad", [(), (0.0,), (0.5, 1.0)])
    def test_capacities(self, bad):
        model, slicing = made("lenet")
        with pytest.raises(ValueError, match=r"capacities must lie in \(0, 1\)"):
            nss.capacity_curve(model, slicing, OLD, capacities=bad)

    def test_an_iterator(self):
        model, slicing = made("lenet")
        with pytest.raises(ValueError, match="used up after one"):
            nss.capacity_curve(model, slicing, iter(OLD))
