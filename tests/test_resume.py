"""A sweep that is interrupted continues where it stopped and ends with the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Mlp, loader, settled

import neusemslice as nss
from neusemslice.profiling import sweep

pytestmark = pytest.mark.usefixtures("device")

BATCHES = loader(40, shape=(12,))


def made(hidden=16):
    torch.manual_seed(0)
    return settled(Mlp(hidden=hidden), 12)


class InterruptedSweepError(Exception):
    pass


def interrupted_after(count):
    yield from BATCHES[:count]
    raise InterruptedSweepError


def assert_same_bits(a, b):
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


@pytest.fixture
def every_batch(monkeypatch):
    monkeypatch.setattr(sweep, "CHECKPOINT_SECONDS", 0.0)


@pytest.mark.pretended
@pytest.mark.parametrize("stops", [[1], [2, 4], [1, 1, 3]])
def test_continues_with_the_same_bits(stops, tmp_path, every_batch):
    path = tmp_path / "checkpoint"
    for count in stops:
        with pytest.raises(InterruptedSweepError):
            nss.profile(made(), interrupted_after(count), checkpoint=path)
        assert path.exists()
    assert_same_bits(nss.profile(made(), BATCHES, checkpoint=path), nss.profile(made(), BATCHES))
    assert not path.exists()


def test_without_an_interruption_nothing_is_left(tmp_path):
    path = tmp_path / "checkpoint"
    nss.profile(made(), BATCHES, checkpoint=path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_sweep_is_refused(tmp_path, every_batch):
    path = tmp_path / "checkpoint"
    with pytest.raises(InterruptedSweepError):
        nss.profile(made(), interrupted_after(1), checkpoint=path)
    with pytest.raises(ValueError, match=r"is the checkpoint of another sweep: .*models"):
        nss.profile(made(hidden=9), BATCHES, checkpoint=path)
    with pytest.raises(ValueError, match=r"is the checkpoint of another sweep: .*metrics"):
        nss.profile(made(), BATCHES, ("avg",), checkpoint=path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        nss.profile(made(), BATCHES, checkpoint=path)


PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
from test_resume import BATCHES, made, sweep
import neusemslice as nss
sweep.CHECKPOINT_SECONDS = 0.0
def slow():
    for number, batch in enumerate(BATCHES):
        if number >= 3:
            print("ready", flush=True)
            time.sleep(60)
        yield batch
nss.profile(made(), slow(), checkpoint={path!r})
"""


@pytest.mark.slow
def test_survives_sigkill(tmp_path):
    path = tmp_path / "checkpoint"
    program = PROGRAM.format(tests=str(Path(__file__).parent), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.exists()
    assert_same_bits(nss.profile(made(), BATCHES, checkpoint=path), nss.profile(made(), BATCHES))
