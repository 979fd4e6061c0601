"""The command line as a user runs it: a file of one's own, an empty folder, several processes."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from neusemslice import Profile, SemanticSlicing
from neusemslice.maintain import Delta, Restructured, Undo, load_tasks
from neusemslice.task import remembered

TASK = """
import torch
from torch import nn

class_names = ["cat", "dog", "owl"]

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))

def train():
    torch.manual_seed(1)
    return [(torch.randn(n, 6), torch.arange(n) % 3) for n in (7, 4, 9, 2, 5)]

def test():
    torch.manual_seed(3)
    return [(torch.randn(10, 6), torch.arange(10) % 3)]

def new():
    torch.manual_seed(2)
    return [(torch.randn(8, 6) + 1, torch.arange(8) % 3) for _ in range(6)]
"""

SLOW = """
from neusemslice.maintain import checkpointing
checkpointing.SECONDS = 0.0

class Slow(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        for batch in quick():
            if self.passes == 7:
                import time
                print("ready", flush=True)
                time.sleep(60)
            yield batch

def new():
    return Slow(quick())
"""


def start(folder: Path, *command: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "neusemslice", *command],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    return finish(start(folder, *command))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path


def test_profile_then_slice(folder):
    result = run(folder, "profile", "task.py", "-o", "out")
    assert result.returncode == 0, result.stderr
    assert "samples per class: cat 11, dog 9, owl 7" in result.stdout
    profile = Profile.load(folder / "out" / "profile.safetensors")
    assert profile.class_names == ("cat", "dog", "owl")
    assert {p.name for p in (folder / "out").iterdir()} == {"profile.safetensors", "task.json"}
    result = run(folder, "slice", "out", "--threshold", "0.8")
    assert result.returncode == 0, result.stderr
    assert "semantic components" in result.stdout
    slicing = SemanticSlicing.load(folder / "out" / "slice.safetensors")
    assert slicing.threshold == 0.8


def sliced(folder):
    for command in (("profile", "task.py", "-o", "out"), ("slice", "out")):
        assert run(folder, *command).returncode == 0


@pytest.mark.slow
def test_restructure(folder):
    """What it writes is the smaller model, and the way back from it."""
    sliced(folder)
    planned = run(folder, "restructure", "out", "--keep", "0.5", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    for text in ("Restructuring would keep", "neurons", "lost"):
        assert text in planned.stdout
    assert not (folder / "out" / "model.safetensors").exists()
    result = run(folder, "restructure", "out", "--keep", "0.5", "--samples", "12")
    assert result.returncode == 0, result.stderr
    for text in ("multiply-adds", "accuracy on 10 samples", "owl", "Compensated", "undo.safe"):
        assert text in result.stdout
    model = remembered(folder / "out").model()
    small = Restructured.load(folder / "out" / "model.safetensors", model)
    assert small.report.widths == {"0": (8, 4), "2": (5, 3)}
    shown = run(folder, "report", "out")
    assert shown.returncode == 0, shown.stderr
    lines = result.stdout.splitlines()
    assert shown.stdout.splitlines() == [line for line in lines if not line.startswith("wrote")]
    parent = Undo.load(folder / "out" / "undo.safetensors").parent(small.model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, parent.state_dict()[name])
    (folder / "task.py").write_text(TASK.replace("def test():", "def unused():"))
    result = run(folder, "restructure", "out", "--macs", "0.6", "--no-compensate")
    assert result.returncode == 0, result.stderr
    assert "accuracy" not in result.stdout
    assert "Compensated" not in result.stdout
    for options, message in (
        (("--macs", "2"), "macs must lie in (0, 1], got 2.0"),
        (("--samples", "3"), "give more samples"),
        (("--latency", "0.5", "--dry-run"), "it has no dry run"),
        (("--samples", "0"), "samples must be at least 1, got 0"),
    ):
        result = run(folder, "restructure", "out", *options)
        assert result.returncode == 1
        assert message in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_readapt(folder):
    """In a folder that was moved since, with the task file."""
    sliced(folder)
    moved = folder / "moved"
    moved.mkdir()
    for name in ("task.py", "out"):
        (folder / name).rename(moved / name)
    result = run(moved, "readapt", "out", "--budget", "0.5", "--epochs", "2", "--replay")
    assert result.returncode == 0, result.stderr
    for text in ("neurons tuned", "steps per second", "old samples", "delta.safetensors"):
        assert text in result.stdout
    assert {p.name for p in (moved / "out").iterdir()} == {
        *("profile.safetensors", "slice.safetensors", "task.json"),
        *("model.safetensors", "delta.safetensors"),
    }
    task = remembered(moved / "out")
    model = task.model()
    Delta.load(moved / "out" / "delta.safetensors").apply(model)
    with safe_open(moved / "out" / "model.safetensors", "pt") as file:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, file.get_tensor(name))


@pytest.mark.slow
def test_readapt_continues_after_an_interrupt(folder):
    """Killed in the third epoch; what follows ends as one that was not killed."""
    sliced(folder)
    slow = TASK.replace("def new():", "def quick():") + SLOW
    (folder / "task.py").write_text(slow)
    process = start(folder, "readapt", "out", "--epochs", "3")
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert (folder / "out" / "readapt-checkpoint.safetensors").exists()
    (folder / "task.py").write_text(TASK)
    deltas = []
    for _ in range(2):
        result = run(folder, "readapt", "out", "--epochs", "3")
        assert result.returncode == 0, result.stderr
        assert not (folder / "out" / "readapt-checkpoint.safetensors").exists()
        deltas.append((folder / "out" / "delta.safetensors").read_bytes())
    assert deltas[0] == deltas[1]


@pytest.mark.slow
def test_extend_twice(folder):
    sliced(folder)
    more = TASK.replace("torch.arange(8) % 3", "torch.arange(8) % 2 + {first}")
    for first, name in ((3, "birds"), (5, "fish")):
        (folder / "task.py").write_text(more.format(first=first))
        options = ("--name", name, "--reserve", "0.5", "--epochs", "1", "--replay", "0.5")
        result = run(folder, "extend", "out", *options)
        assert result.returncode == 0, result.stderr
        for text in ("old answers bit-identical", "expected", "Free for further tasks", name):
            assert text in result.stdout
    assert {p.name for p in (folder / "out" / "tasks").iterdir()} == {
        *("backbone.safetensors", "task-old.safetensors"),
        *("task-birds.safetensors", "task-fish.safetensors"),
    }
    tasks = load_tasks(folder / "out" / "tasks", remembered(folder / "out").model())
    assert tasks(torch.randn(4, 6)).shape == (4, 7)
    result = run(folder, "extend", "out", "--name", "fish")
    assert result.returncode == 1
    assert "the new data holds old classes: [5, 6]" in " ".join(result.stderr.split())


@pytest.mark.slow
def test_ranks_give_the_profile_of_one_process(folder):
    """Two processes with the environment that torchrun gives its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        start(
            folder,
            *("profile", "task.py", "-o", "two"),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            GLOO_SOCKET_IFNAME="lo",
            OMP_NUM_THREADS="1",
        )
        for rank in range(2)
    ]
    for process in ranks:
        result = finish(process)
        assert result.returncode == 0, result.stderr
    assert run(folder, "profile", "task.py", "-o", "one").returncode == 0
    one, two = (Profile.load(folder / name / "profile.safetensors") for name in ("one", "two"))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("source", "command", "message"),
    [
        (None, ("profile", "gone.py"), "gone.py: no such file"),
        ("def model(): pass", ("profile", "task.py"), "task.py has no function train()"),
        ("import nothing_here", ("profile", "task.py"), "cannot be imported: ModuleNotFoundError"),
        (
            "model = train = lambda: 3",
            ("profile", "task.py"),
            "must return a torch.nn.Module",
        ),
        (None, ("profile", "task.py", "--metric", "sum"), "metrics must be among"),
        (None, ("slice", "nowhere"), "profile.safetensors: no such file"),
        (None, ("restructure", "nowhere"), "task.json: no such file"),
        (None, ("extend", "nowhere"), "task.json: no such file; neusemslice profile writes it"),
        (None, ("readapt", "nowhere"), "task.json: no such file; neusemslice profile writes it"),
    ],
)
def test_what_is_wrong_is_one_sentence(folder, source, command, message):
    if source is not None:
        (folder / "task.py").write_text(source)
    result = run(folder, *command)
    assert result.returncode == 1
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_help_lists_the_commands(folder):
    shown = run(folder, "--help").stdout
    for command in ("demo", "profile", "slice", "restructure", "readapt", "extend", "report"):
        assert command in shown
