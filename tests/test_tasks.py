"""Several tasks in a row: every answer keeps its bits, whatever is learned later."""

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import here, num_threads
from models import IMAGES, images, loader, settled
from torch import nn
from transformer_models import batch, batches, transformer

import neusemslice as nss
from neusemslice.graph import Inputs
from neusemslice.maintain import (
    TaskSet,
    export_task,
    load_tasks,
    save_tasks,
)

pytestmark = pytest.mark.usefixtures("device")

OLD = loader(96)
X = images(11, 1, 8, 8, seed=1)


def two_more(first):
    """Batches of two further classes."""
    return [(1.1 * x.roll(first, 2), y % 2 + first) for x, y in loader(48)]


def first_task(name="residual", **options):
    model = settled(IMAGES[name](), 1, 8, 8)
    slicing = nss.slice(nss.profile(model, OLD), threshold=0.6)
    options = {"capacity": 0.75, "reserve": 0.6, "epochs": 1} | options
    return model, slicing, nss.extend(model, slicing, two_more(4), name="t4", **options)


def five_tasks():
    _, _, result = first_task()
    tasks, seen = result.model, {}
    for first in (6, 8, 10):
        seen[first] = {name: tasks.task(name)(here(X)) for name in tasks.tasks}
        tasks = nss.extend(
            tasks, None, two_more(first), name=f"t{first}", reserve=0.5, epochs=1, lr=3e-2
        ).model
    return tasks, seen


def test_five_tasks_in_a_row_never_change_by_a_bit():
    tasks, seen = five_tasks()
    assert list(tasks.tasks) == ["old", "t4", "t6", "t8", "t10"]
    for before in seen.values():
        for name, answer in before.items():
            assert torch.equal(tasks.task(name)(here(X)), answer), name
    slices = [task.slice for task in tasks.tasks.values()]
    for earlier, later in itertools.pairwise(slices):
        assert earlier - later == earlier ^ earlier, "a later task reads all earlier neurons"
        assert len(later) > len(earlier)
    assert tasks(here(X)).shape == (11, 12)
    assert tasks.classes == tuple(range(12))


@pytest.mark.pretended
def test_only_a_tasks_own_weights_are_trained():
    _, _, result = first_task()
    before = copy.deepcopy(result.model.state_dict())
    later = nss.extend(result.model, None, two_more(6), name="t6", epochs=2, weight_decay=0.5)
    for key, value in result.model.state_dict().items():
        assert torch.equal(value, before[key]), f"the given set's {key} changed"
    own = later.model.tasks["t6"].slice - result.model.tasks["t4"].slice
    for key, value in later.model.state_dict().items():
        if key not in before:
            continue  # the new task's head and norms
        moved = value != before[key]
        for site in own.graph.sites:
            neurons = here(own.mask(site.name).nonzero().squeeze(1))
            for span in (*site.rows, *site.columns):
                if f"backbone.{span.tensor}" == key:
                    moved.index_fill_(span.dim, span.indices(neurons), False)
        assert not moved.any(), key


def test_training_mode_moves_no_statistic_and_no_answer():
    _, _, result = first_task()
    tasks = result.model
    expected = tasks.task("old")(here(X))
    tasks.train()
    tasks.task("t4")(here(torch.randn(16, 1, 8, 8)))
    tasks(here(torch.randn(16, 1, 8, 8)))
    assert torch.equal(tasks.task("old")(here(X)), expected)


def test_parts_are_back_in_their_places_after_an_error():
    _, _, result = first_task()
    tasks = result.model
    head, norm = tasks.backbone.head, tasks.backbone.bn1
    with pytest.raises(RuntimeError):
        tasks.task("t4")(here(torch.randn(1, 2, 8, 8)))
    assert tasks.backbone.head is head
    assert tasks.backbone.bn1 is norm


class Normed(nn.Module):
    """A residual block over a stream that passes norms over several neurons."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 2, padding=1)
        self.norm = nn.GroupNorm(2, 8) if kind == "groupnorm" else nn.LayerNorm([8, 4, 4])
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))


KINDS = {name: IMAGES[name] for name in IMAGES if name != "grouped"} | {
    kind: lambda kind=kind: Normed(kind) for kind in ("groupnorm", "layernorm")
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*KINDS, "vit", "llama"])
def test_bits_on_every_kind_of_model(name, dtype, threads):
    if name in KINDS:
        model = settled(KINDS[name](), 1, 8, 8).to(dtype)
        old = [(x.to(dtype), y) for x, y in loader(48)]
        new = [(1.3 - x, y + 4) for x, y in old]
        later = [(x.flip(3), y + 8) for x, y in old]
        inputs = Inputs((here(X.to(dtype)),))
    else:
        model = transformer(name).to(dtype)
        old = [{k: as_type(v, dtype) for k, v in b.items()} for b in batches(name)]
        new = [b | {"labels": b["labels"] + 3} for b in old]
        later = [b | {"labels": b["labels"] + 6} for b in old]
        given = here(batch(name, 5, seed=9))
        inputs = Inputs((), {k: as_type(v, dtype) for k, v in given.items()})
    with num_threads(threads):
        slicing = nss.slice(nss.profile(model, old), threshold=0.6)
        first = nss.extend(model, slicing, new, capacity=0.5, reserve=0.5, epochs=1, lr=1e-2)
        again = nss.extend(first.model, None, later, name="later", epochs=1, lr=1e-2)
        tasks = again.model
        with torch.no_grad():
            with first.frozen.applied(model):
                old_answer = nss.graph.logits_of(inputs.run(model))
            new_answer = first.model.answer("new", *inputs.args, **inputs.kwargs)
            assert torch.equal(tasks.answer("old", *inputs.args, **inputs.kwargs), old_answer)
            assert torch.equal(tasks.answer("new", *inputs.args, **inputs.kwargs), new_answer)
    assert old_answer.isfinite().all()


def as_type(value, dtype):
    return value.to(dtype) if value.is_floating_point() else value


class TestFiles:
    def test_a_fresh_process_gives_the_same_bits(self, tmp_path, device):
        _, _, result = first_task(grow=0.5, replay=0.5, old=OLD, old_epochs=1)
        tasks = result.model
        paths = save_tasks(tasks, tmp_path)
        assert [p.name for p in paths] == [
            "backbone.safetensors",
            "task-old.safetensors",
            "task-t4.safetensors",
        ]
        answers = {name: tasks.task(name)(here(X)) for name in tasks.tasks}
        torch.save(answers | {"all": tasks(here(X))}, tmp_path / "y")
        code = (
            "import sys, torch; sys.path.insert(0, 'tests')\n"
            "from models import Residual, images\n"
            "from neusemslice.maintain import load_tasks\n"
            "torch.set_num_threads(int(sys.argv[2]))\n"
            "tasks = load_tasks(sys.argv[1], Residual().to(sys.argv[3]))\n"
            "x = images(11, 1, 8, 8, seed=1).to(sys.argv[3])\n"
            "with torch.no_grad():\n"
            "    for name, answer in torch.load(sys.argv[1] + '/y').items():\n"
            "        found = tasks(x) if name == 'all' else tasks.task(name)(x)\n"
            "        assert torch.equal(found, answer), name\n"
        )
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads()), str(device)],
            cwd=Path(__file__).parent.parent,
            check=True,
        )

    @pytest.mark.pretended
    def test_a_further_task_leaves_earlier_files_as_they_are(self, tmp_path):
        _, _, result = first_task()
        save_tasks(result.model, tmp_path)
        before = {p.name: p.read_bytes() for p in tmp_path.glob("task-*")}
        later = nss.extend(result.model, None, two_more(6), name="t6", epochs=1)
        save_tasks(later.model, tmp_path)
        assert {n: (tmp_path / n).read_bytes() for n in before} == before
        loaded = load_tasks(tmp_path, here(IMAGES["residual"]()))
        assert torch.equal(loaded.task("t6")(here(X)), later.model.task("t6")(here(X)))

    def test_refusals(self, tmp_path):
        _, _, result = first_task()
        _, _, other = first_task(epochs=2)
        save_tasks(result.model, tmp_path / "a")
        save_tasks(other.model, tmp_path / "b")
        (tmp_path / "a/task-t4.safetensors").write_bytes(
            (tmp_path / "b/task-t4.safetensors").read_bytes()
        )
        with pytest.raises(ValueError, match=r"task-t4\.safetensors is not of the set"):
            load_tasks(tmp_path / "a", IMAGES["residual"]())
        with pytest.raises(ValueError, match=r"backbone\.safetensors: "):
            load_tasks(tmp_path / "b", IMAGES["lenet"]())
        (tmp_path / "b/task-t4.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="task-t4"):
            load_tasks(tmp_path / "b", IMAGES["residual"]())
        with pytest.raises(ValueError, match=r"torch\.float32, the model's is torch\.float64"):
            load_tasks(tmp_path / "b", IMAGES["residual"]().double())


@pytest.mark.parametrize("name", ["lenet", "residual", "concatenated", "depthwise"])
def test_a_task_alone_is_small_and_answers_the_same(name):
    _, _, result = first_task(name, replay=0.5, old=OLD, old_epochs=1)
    tasks = result.model
    whole = sum(p.numel() for p in tasks.backbone.parameters())
    for task in tasks.tasks:
        small = export_task(tasks, task, Inputs((here(X),)))
        expected = tasks.task(task)(here(X))
        assert (small(here(X)) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert sum(p.numel() for p in small.parameters()) < whole
        assert not any(isinstance(m, TaskSet) for m in small.modules())
    assert isinstance(tasks.backbone, nn.Module)


@pytest.mark.pretended
def test_a_transformers_task_alone_and_wider():
    model, old = transformer("vit"), batches("vit")
    new = [b | {"labels": b["labels"] + 3} for b in old]
    slicing = nss.slice(nss.profile(model, old), threshold=0.6)
    tasks = nss.extend(model, slicing, new, capacity=0.5, epochs=1).model
    inputs = Inputs((), here(batch("vit", 5, seed=9)))
    small = export_task(tasks, "old", inputs)
    expected = tasks.answer("old", **inputs.kwargs)
    assert (small(**inputs.kwargs).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert small.vit.layers[0].mlp.fc1.out_features == 12
    later = [b | {"labels": b["labels"] + 6} for b in old]
    grown = nss.extend(tasks, None, later, name="more", grow=0.25, epochs=1).model
    assert grown.backbone.vit.layers[0].mlp.fc1.out_features == 30
    assert torch.equal(tasks.answer("old", **inputs.kwargs), expected)
