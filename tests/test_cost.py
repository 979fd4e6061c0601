"""What a model costs, against what can be counted by hand."""

import pytest
import torch
from helpers import here
from models import lenet
from torch import nn

from neusemslice.graph import Inputs
from neusemslice.maintain import latency, measure
from neusemslice.maintain.cost import activation_bytes

pytestmark = pytest.mark.usefixtures("device")


def test_sizes_are_those_of_parameters_and_buffers():
    model = here(lenet())
    cost = measure(model, Inputs((torch.randn(3, 1, 8, 8),)))
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.model_bytes == sum(t.nbytes for t in model.state_dict().values())
    assert cost.macs == 36 * 64 + 216 * 16 + 960 + 40
    assert set(cost.latency) == {1, 64}
    assert all(seconds > 0 for seconds in cost.latency.values())


def test_a_pass_that_takes_long_is_repeated_less():
    calls = []

    class Counting(nn.Identity):
        def forward(self, x):
            calls.append(0)
            return x

    latency(Counting(), Inputs((torch.randn(1, 4),)), seconds=0.0)
    assert len(calls) == 1 + 3
    latency(Counting(), Inputs((torch.randn(1, 4),)), seconds=0.01)
    assert len(calls) >= 4 + 3 + 10


def test_the_most_that_lives_at_once():
    """Input 4 + hidden 8, then hidden 8 + 8 (the input is alive as long as the call), then less."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = self.inner(x)
            h = torch.exp(h)
            return self.outer(h)

    x = Inputs((torch.randn(1, 4),))
    assert activation_bytes(here(Chain()), x) == 4 * (4 + 8 + 8)
    assert activation_bytes(here(Chain()), Inputs((torch.randn(5, 4),))) == 5 * 4 * (4 + 8 + 8)
    assert activation_bytes(nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True)), x) == 4 * 4
