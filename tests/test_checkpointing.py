"""A re-adaptation that is interrupted continues where it stopped and ends with the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Mlp, loader, settled
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import neusemslice as nss
from neusemslice.maintain import checkpointing

pytestmark = pytest.mark.usefixtures("device")

OLD = loader(60, shape=(12,))
NEW = [(x * 1.5 + 0.7, y) for x, y in OLD]
OPTIONS = {"budget": 0.5, "epochs": 4, "patience": 4, "lr": 1e-2}


class Noisy(nn.Module):
    """Dropout asks for random numbers between those that the loader asks for; and a batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(12)
        self.body = Mlp()
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return self.body(self.drop(self.norm(x)))


class StoppedError(Exception):
    pass


class Interrupted:
    """A loader that fails at its n-th batch, over all passes."""

    def __init__(self, inner, at):
        self.inner, self.left = inner, at
        self.generator = getattr(inner, "generator", None)

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        for batch in self.inner:
            self.left -= 1
            if self.left < 0:
                raise StoppedError
            yield batch


def made():
    torch.manual_seed(0)
    model = settled(Noisy(), 12)
    return model, nss.slice(nss.profile(model, OLD), threshold=0.9)


def shuffled(own_generator):
    x, y = (torch.cat(parts) for parts in zip(*NEW, strict=True))
    generator = torch.Generator().manual_seed(3) if own_generator else None
    return DataLoader(TensorDataset(x, y), 7, shuffle=True, generator=generator)


def assert_same(one, two):
    for key, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[key]), key
    a, b = one.report, two.report
    assert a.training.losses == b.training.losses
    assert a.training.steps == b.training.steps
    assert (a.new_before, a.new_after, a.best_epoch) == (b.new_before, b.new_after, b.best_epoch)
    assert (a.components, a.drift) == (b.components, b.drift)
    assert one.tuned == two.tuned


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setattr(checkpointing, "SECONDS", 0.0)


@pytest.mark.parametrize("stops", [[12], [31, 40], [45, 21, 28]])
@pytest.mark.parametrize("kind", ["list", "own generator", "global generator"])
@pytest.mark.parametrize("options", [{}, {"replay": True, "old": OLD, "recalibrate": True}])
def test_continues_with_the_same_bits(stops, kind, options, tmp_path, every_step):
    path = tmp_path / "checkpoint"

    def data():
        return NEW if kind == "list" else shuffled(kind == "own generator")

    def run(batches):
        model, slicing = made()
        torch.manual_seed(7)
        return nss.readapt(model, slicing, batches, **OPTIONS, **options, checkpoint=path)

    whole = run(data())
    assert not path.exists()
    for count in stops:
        with pytest.raises(StoppedError):
            run(Interrupted(data(), count))
        torch.manual_seed(99)
    assert path.exists() or stops == [12]
    assert_same(run(data()), whole)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.pretended
def test_a_checkpoint_of_another_run_is_refused(tmp_path, every_step):
    path = tmp_path / "checkpoint"
    model, slicing = made()
    with pytest.raises(StoppedError):
        nss.readapt(model, slicing, Interrupted(NEW, 40), **OPTIONS, checkpoint=path)
    raw = path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint of another run, with lr = 0\.01 instead of"):
        nss.readapt(model, slicing, NEW, **(OPTIONS | {"lr": 0.02}), checkpoint=path)
    with torch.no_grad():
        model.body.head.bias[0] += 1
    with pytest.raises(ValueError, match="checkpoint of another run, with weights ="):
        nss.readapt(model, slicing, NEW, **OPTIONS, checkpoint=path)
    assert path.read_bytes() == raw
    path.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        nss.readapt(model, slicing, NEW, **OPTIONS, checkpoint=path)


PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from test_checkpointing import NEW, OPTIONS, checkpointing, made, nss
checkpointing.SECONDS = 0.0
class Slow(list):
    left = 35
    def __iter__(self):
        for batch in NEW:
            self.left -= 1
            if self.left < 0:
                print("ready", flush=True)
                time.sleep(60)
            yield batch
nss.readapt(*made(), Slow(NEW), **OPTIONS, checkpoint={path!r})
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
    model, slicing = made()
    continued = nss.readapt(model, slicing, NEW, **OPTIONS, checkpoint=path)
    torch.manual_seed(0)
    model, slicing = made()
    assert_same(continued, nss.readapt(model, slicing, NEW, **OPTIONS))
