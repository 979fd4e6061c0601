"""Nothing mixes devices: what a device refuses, and code that runs on one that is pretended."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import here
from models import Residual, Tied, images, settled
from torch.utils import backend_registration

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
def test_a_chosen_few_run_on_a_pretended_device():
    command = [sys.executable, "-m", "pytest", "--pretend", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*command, str(Path(__file__).parent)], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


@pytest.fixture
def x(device):
    if device.type == "cpu":
        pytest.skip("there is one device only")
    return torch.arange(6.0).view(2, 3).to(device)


@pytest.mark.pretended
@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(2, 3).mul_(x),
        lambda x: x.index_select(0, torch.tensor([1])),
        lambda x: torch.ones(2, 3)[x > 2],
        lambda x: x.masked_fill(torch.ones(2, 3) > 0, 0.0),
        lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
        lambda x: torch.equal(x, torch.ones(2, 3)),
        lambda x: F.linear(torch.ones(4, 3), x),
    ],
)
def test_mixing_is_refused(x, mix):
    with pytest.raises(RuntimeError, match=r"mixes devices|same device|be on the CPU|indices"):
        mix(x)


@pytest.mark.pretended
def test_its_values_are_not_numpys(x):
    with pytest.raises((RuntimeError, TypeError), match=r"numpy"):
        x.numpy()


@pytest.mark.pretended
def test_copies_indices_and_numbers_are_not_mixing(x):
    assert (x * torch.tensor(2.0)).tolist() == [[0, 2, 4], [6, 8, 10]]
    assert x[torch.tensor([True, False])].tolist() == [[0, 1, 2]]
    x[:, torch.tensor([0])] = 7.0
    assert torch.ones(2, 3).copy_(x).tolist() == [[7, 1, 2], [7, 4, 5]]
    assert x.cpu().device.type == "cpu"
    assert x.new_zeros(2).device == torch.arange(2, device=x.device).device == x.device


@pytest.mark.pretended
def test_a_network_computes_as_on_the_cpu(device):
    torch.manual_seed(0)
    model = settled(Residual(), 1, 8, 8).cpu()
    F.cross_entropy(model(images(5, 1, 8, 8)), torch.arange(5) % 4).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model, tied = here(model), settled(Tied(), 12)
    F.cross_entropy(model(here(images(5, 1, 8, 8))), here(torch.arange(5) % 4)).backward()
    assert tied.two.weight is tied.one.weight
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.device.type == parameter.grad.device.type == device.type
        torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-5, atol=1e-6)
