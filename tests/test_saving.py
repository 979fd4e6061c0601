"""A restructured model is saved, and built again in another process."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Mlp
from restructured import NETWORKS, build, case
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from neusemslice.graph import fingerprint, logits_of
from neusemslice.maintain import Restructured, finetune, parameter_count

pytestmark = pytest.mark.usefixtures("device")

CHILD = """
import sys
import torch
sys.modules["torch_pruning"] = None  # loading traces nothing
from helpers import on_device
from restructured import build
from neusemslice import _files
from neusemslice.graph import Inputs, logits_of
from neusemslice.maintain import Restructured

for name in sys.argv[3:]:
    with on_device(torch.device(sys.argv[2])):
        small = Restructured.load(f"{sys.argv[1]}/{name}", build(name, seed=5))
    def same(tensors, content):
        inputs = {name: tensor.to(sys.argv[2], copy=True) for name, tensor in tensors.items()}
        expected = inputs.pop("answer")
        given = Inputs((inputs.pop("x"),)) if "x" in inputs else Inputs((), inputs)
        with torch.no_grad():
            assert torch.equal(logits_of(given.run(small.model)), expected), name
    _files.read(f"{sys.argv[1]}/{name}.answer", "answer", same)
    print(name, small.kept.digest, small.report.after.parameters)
"""


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_bits(tmp_path, device):
    """From a model of the same class with other values, without torch-pruning and without data."""
    from neusemslice import _files

    expected = []
    for name in NETWORKS:
        made = case(name)
        made.small.save(tmp_path / name)
        with torch.no_grad():
            answer = logits_of(made.inputs.run(made.small.model))
        given = dict(made.inputs.kwargs) or {"x": made.inputs.args[0]}
        _files.write(tmp_path / f"{name}.answer", "answer", given | {"answer": answer}, {})
        expected.append(f"{name} {made.small.kept.digest} {parameter_count(made.small.model)}")
    root = Path(__file__).parent
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(device), *NETWORKS],
        env=os.environ | {"PYTHONPATH": f"{root}:{root.parent}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == expected


@pytest.mark.parametrize("name", ["depthwise", "tied", "bert"])
def test_what_is_loaded_is_what_was_saved(tmp_path, name):
    """Statistics, ties, sizes in the modules, the report and the dtype."""
    made = case(name)
    small = dataclasses.replace(made.small, model=copy.deepcopy(made.small.model).bfloat16())
    given = build(name, seed=5)
    before = copy.deepcopy(given.state_dict())
    found = Restructured.load(small.save(tmp_path / "model"), given)
    assert found.kept == small.kept
    assert found.report == small.report
    assert repr(found.model) == repr(small.model)
    tensors = small.model.state_dict()
    for key, value in found.model.state_dict().items():
        assert value.dtype == tensors[key].dtype
        assert torch.equal(value, tensors[key]), key
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())
    if name == "tied":
        assert found.model.one.weight is found.model.two.weight


def test_what_training_made_of_it_is_saved(tmp_path):
    made = case("residual")
    small = copy.deepcopy(made.small.model)
    finetune(small, made.batches, epochs=1)
    path = dataclasses.replace(made.small, model=small).save(tmp_path / "model")
    found = Restructured.load(path, build("residual"))
    with torch.no_grad():
        assert torch.equal(found.model(*made.inputs.args), small(*made.inputs.args))


class TestRefusals:
    @pytest.fixture
    def saved(self, tmp_path):
        return case("lenet").small.save(tmp_path / "model.safetensors")

    def damaged(self, path, change):
        """The file with its content or its tensors changed."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            head = json.loads(file.metadata()["neusemslice"])
        change(tensors, head["content"])
        path.write_bytes(save(tensors, {"neusemslice": json.dumps(head)}))
        return path

    @pytest.mark.parametrize("model", [Mlp(), nn.Linear(2, 2)])
    def test_another_model(self, saved, model):
        with pytest.raises(ValueError, match=r"model\.safetensors: the slice belongs to another"):
            Restructured.load(saved, model)

    def test_the_small_model_itself(self, saved):
        with pytest.raises(ValueError, match="site 0: layer 0 must have 1 inputs and 4 outputs"):
            Restructured.load(saved, copy.deepcopy(case("lenet").small.model))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t, c: t.pop("model/0.bias"), "the file or the model has no 0.bias"),
            (lambda t, c: t.update({"model/x": torch.zeros(1)}), "the file or the model has no x"),
            (
                lambda t, c: t.update({"model/0.bias": torch.zeros(2)}),
                r"0\.bias must have shape \[3\], has \[2\]",
            ),
            (lambda t, c: t["model/0.bias"].add_(1), "the digest of its tensors is another"),
            (lambda t, c: c.update(structure="0"), "the digest of its tensors is another"),
            (lambda t, c: t.pop("kept/0"), "kept/0|'0'"),
            (lambda t, c: t.update({"kept/0": torch.zeros(3)}), "words must be int64"),
            (lambda t, c: c.pop("kept"), "'kept'"),
            (lambda t, c: c["kept"]["graph"].pop("sites"), "'sites'"),
            (lambda t, c: c["kept"]["graph"]["sites"][0]["rows"][0].update(tensor="no"), "no"),
            (lambda t, c: c["kept"]["graph"]["sites"][0]["rows"][0].update(start=9**18), ""),
            (lambda t, c: c["kept"]["graph"]["sites"][0]["rows"][0].update(repeat=9**12), ""),
            (lambda t, c: c["more"].pop("before"), "'before'"),
            (lambda t, c: c["more"].update(before=3), ""),
            (lambda t, c: c.update(more=[1]), ""),
        ],
    )
    def test_a_damaged_file(self, saved, change, message):
        given = build("lenet", seed=5)
        structure = fingerprint(given)
        with pytest.raises(ValueError, match=rf"model\.safetensors is damaged: .*({message})"):
            Restructured.load(self.damaged(saved, change), given)
        assert fingerprint(given) == structure

    def test_another_kind_of_file(self, tmp_path):
        path = case("lenet").slicing.critical_slice().save(tmp_path / "slice")
        with pytest.raises(ValueError, match="holds a slice, expected a restructured model"):
            Restructured.load(path, build("lenet"))
