"""The curve over θ: accuracies by hand, its knee, its figure."""

import copy

import pytest
import torch
from helpers import here
from models import IMAGES, loader, settled
from test_faithfulness import by_hand

import neusemslice as nss
from neusemslice.report.theta import THETAS


def curve(density: list[float], kept: list[float]) -> nss.ThetaCurve:
    thetas = tuple(0.9 + 0.01 * i for i in range(len(kept)))
    return nss.ThetaCurve("taylor", thetas, torch.tensor(density), torch.tensor(kept), 0.95)


class TestKnee:
    @pytest.mark.parametrize(
        ("density", "kept", "knee"),
        [
            ([0.1, 0.2, 0.3, 0.4], [0.1, 0.8, 0.85, 0.9], 1),
            ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.85, 0.9], 2),
            # A straight line and a curve below it have no knee: as accurate as can be.
            ([0.1, 0.2, 0.3], [0.2, 0.4, 0.6], 2),
            ([0.1, 0.2, 0.3], [0.2, 0.3, 0.9], 2),
            ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5], 0),
            ([0.3, 0.3, 0.3], [0.5, 0.5, 0.5], 0),
            ([0.1, 0.5], [0.2, 0.9], 1),
        ],
    )
    def test_by_hand(self, density, kept, knee):
        assert curve(density, kept).knee == knee

    def test_in_words(self):
        assert str(curve([0.1, 0.2, 0.3, 0.4], [0.1, 0.8, 0.85, 0.9])) == (
            "The knee is at θ = 0.91 by taylor: 20.0% of the neurons answer 80.0% of the samples "
            "rightly, all of them 95.0%."
        )


@pytest.mark.usefixtures("device")
class TestCurve:
    def test_by_hand(self):
        model, slicing, batches = by_hand()
        found = nss.theta_curve(model, slicing, batches, thresholds=(1.0, 0.6, 0.9, 0.6))
        assert found.thresholds == (0.6, 0.9, 1.0)
        assert found.density.tolist() == [0.5, 0.75, 1.0]
        assert found.kept.tolist() == [1.0, 1.0, 1.0]
        assert found.whole == 1.0

    @pytest.mark.pretended
    def test_of_a_model(self, tmp_path):
        model = settled(IMAGES["lenet"](), 1, 8, 8)
        slicing = nss.slice(nss.profile(model, loader()))
        before = copy.deepcopy(model.state_dict())
        found = nss.theta_curve(model, slicing, loader(samples=40))
        assert found.thresholds == THETAS
        assert (found.density.diff() >= 0).all()
        for i in (0, 9):
            at = nss.slice(slicing.profile, threshold=THETAS[i]).critical_slice()
            with at.applied(model):
                answers = [(model(here(x)).argmax(1).cpu(), y) for x, y in loader(samples=40)]
            assert found.kept[i] == sum(int((a == y).sum()) for a, y in answers) / 40
            assert found.density[i] == at.density
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        path = found.figure(tmp_path / "theta.png")
        assert path.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("thresholds", [(), (0.9,), (0.0, 0.9), (0.9, 1.1)])
    def test_refusals(self, thresholds):
        model, slicing, batches = by_hand()
        with pytest.raises(ValueError, match=r"theta_curve: thresholds must be two or more in"):
            nss.theta_curve(model, slicing, batches, thresholds=thresholds)
        with pytest.raises(ValueError, match="theta_curve: the loader must give its batches again"):
            nss.theta_curve(model, slicing, iter(batches))
        with pytest.raises(ValueError, match="belongs to another model"):
            nss.theta_curve(IMAGES["lenet"](), slicing, batches)
        with pytest.raises(ValueError, match="theta_curve: batch 0: labels must lie in"):
            nss.theta_curve(model, slicing, [(batches[0][0], torch.full((6,), 7))])
