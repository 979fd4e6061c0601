"""What a sweep will take: sizes exactly, times by a clock that the test moves."""

import copy
import time

import pytest
import torch
from models import IMAGES, loader, settled

import neusemslice as nss
from neusemslice.profiling import Estimate, estimate

pytestmark = pytest.mark.usefixtures("device")


class TestEstimate:
    def test_memory_is_that_of_the_profile(self):
        model = settled(IMAGES["lenet"](), 1, 8, 8)
        before = copy.deepcopy(model.state_dict())
        found = estimate(model, loader(samples=60), ("avg", "taylor"))
        profile = nss.profile(model, loader(samples=60), ("avg", "taylor"))
        assert found.state_bytes == sum(t.nbytes for t in profile.state_dict().values())
        assert found.batches == 9
        assert found.seconds > 0
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_time_is_extrapolated(self, monkeypatch):
        clock = [0.0]

        def sweep(model, batches, metrics):
            clock[0] += 5 + 2 * len(batches)
            return nss.Profile.empty(nss.profile(model, loader()).graph, ["a"], ("avg",))

        monkeypatch.setattr("neusemslice.profiling.estimating.profile", sweep)
        monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
        found = estimate(settled(IMAGES["lenet"](), 1, 8, 8), loader(samples=70))
        assert found.batches == 10
        assert found.seconds == 5 + 2 * 10

    def test_one_batch(self):
        model = settled(IMAGES["lenet"](), 1, 8, 8)
        assert estimate(model, loader(samples=7), ("avg",)).batches == 1

    def test_in_words(self):
        assert str(Estimate(1200, 754.6, 3 * 2**20)) == (
            "1,200 batches take about 12 min 35 s, and their statistics 3.0 MiB."
        )

    def test_refusals(self):
        model = settled(IMAGES["lenet"](), 1, 8, 8)
        with pytest.raises(TypeError, match="the loader must have a length, got list_iterator"):
            estimate(model, iter(loader()))
        with pytest.raises(ValueError, match="the loader has no batch"):
            estimate(model, [])
