"""The study: what its figures mean, and that every question is answered quickly on small data."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import quick
from torch import nn

from bench import report
from bench.datasets import small_digits
from bench.mixed import mixed
from bench.study import figures, networks, readme, rq1
from bench.study.outcome import SPREAD, Outcome, spread


def test_a_curve_runs_from_the_whole_network_to_chance():
    found = rq1.curve([(0.5, 0.8), (0.5, 0.6), (0.0, 0.1)], whole=0.9, chance=0.1)
    rates = rq1.RATES
    assert found[0] == 0.9
    assert found[-1] == pytest.approx(0.1)
    assert found[np.searchsorted(rates, 0.5)] == pytest.approx(0.7)
    area = 0.5 * (0.9 + 0.7) / 2 + 0.5 * (0.7 + 0.1) / 2
    assert np.trapezoid(found, rates) == pytest.approx(area)


def test_accuracy_is_counted_by_class():
    right = torch.tensor([True, False, True, True])
    assert rq1.by_class(right, torch.tensor([1, 1, 0, 1])) == [1.0, pytest.approx(2 / 3, abs=1e-5)]


def test_a_row_tells_its_seeds():
    assert spread([1.0, 2.0, 6.0]) == {
        "seeds": 3,
        "mean": 3.0,
        "std": pytest.approx(np.std([1, 2, 6], ddof=1)),
    }
    assert spread([1.0])["std"] is None


def test_networks_are_the_same_for_the_same_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(networks.cifar, "CACHE", tmp_path)
    one, again, other = (networks.DIGITS._train(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(again[key], value) for key, value in one.items())
    assert not any(torch.equal(other[key], value) for key, value in one.items())
    kept = [networks.DIGITS.trained(0).state_dict() for _ in range(2)]
    assert all(torch.equal(value, one[key]) for own in kept for key, value in own.items())


@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.name)
def test_every_network_answers_images_of_its_data_set(network):
    if network.name.startswith("ViT"):
        pytest.importorskip("transformers")
    shape = (1, 28, 28) if "MNIST" in network.name else (3, 32, 32)
    with torch.no_grad():
        assert network.make().eval()(torch.zeros(2, *shape)).shape == (2, 10)


def test_the_readme_shows_the_table_that_was_measured(tmp_path, monkeypatch):
    assert f"{readme.BEGIN}\n{readme.table()}\n{readme.END}" in readme.README.read_text()
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}an old table\n{readme.END}after\n")
    monkeypatch.setattr(readme, "README", page)
    readme.update()
    assert page.read_text().splitlines()[0] == "before"
    assert readme.table() in page.read_text()
    assert page.read_text().splitlines()[-1] == "after"
    assert "an old table" not in page.read_text()


def test_a_mixed_network_computes_in_bfloat16_where_gradients_are_recorded():
    torch.manual_seed(0)
    plain = networks.vgg11().eval()
    model = mixed(copy.deepcopy(plain))
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert model(x).dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]
    assert isinstance(copy.deepcopy(model), nn.Sequential)
    assert type(plain) is nn.Sequential


def test_an_outcome_is_a_page_a_file_of_data_and_a_figure(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.report.RESULTS", tmp_path)
    pytest.importorskip("matplotlib")
    rows = [rq1.Result("a", spread([1.0, 3.0])), rq1.Result("b", spread([2.0]))]
    lines = {"a": {"one": (np.arange(3), np.ones((2, 3)))}, "b": {}}
    outcome = Outcome(
        "What?",
        [rq1.Section("rq", "Title", "Note", SPREAD, rows)],
        lambda path: figures.curves(lines, 2, "x", "y", path),
    )
    page = outcome.write("rq9")
    assert {p.name for p in page.parent.iterdir()} == {"rq9.md", "rq9.json", "rq9.png"}
    assert "| a | 2 | 2.00 | 1.41 |" in page.read_text()
    assert report.processor() in page.read_text()
    section = json.loads(page.with_suffix(".json").read_text())["sections"]["rq"]
    assert section["results"][1]["values"] == {"seeds": 1, "mean": 2.0, "std": None}
    assert json.loads(outcome.summary())["a"] == {"seeds": 2, "mean": 2.0, "std": 1.414}


def test_figures_have_the_deviations_of_the_tables():
    values = [90.0, 91.0, 95.0]
    assert figures.deviations(np.array(values)) == pytest.approx(spread(values)["std"])
    assert not figures.deviations(np.array([[90.0, 91.0]])).any()


def test_bars_have_a_group_for_each_method(tmp_path):
    pytest.importorskip("matplotlib")
    panel = {"ours": {"A": [90.0, 91.0], "B": [80.0, 82.0]}, "theirs": {"A": [1.0], "B": [2.0]}}
    figures.bars({"one": panel, "two": panel}, "x", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "needed", "rows"),
    [
        ("rq1", "torch", ("digits: taylor, semantic", "digits: avg, category")),
        (
            "rq2",
            "torch_pruning",
            (
                "digits: lamp, slicing first",
                "digits: global, layers removed first (DeepArc)",
                "digits: Taylor, 50% of multiply-adds",
            ),
        ),
        ("rq3", "peft", ("adversarial, FGSM: ours", "damaged, weights drawn anew 30: LoRA")),
        ("rq4", "torch", ("digits-2: ours",)),
    ],
)
def test_a_question_is_answered_on_small_data(question, needed, rows):
    pytest.importorskip(needed)
    found = quick("bench.study", question)
    for row in found.values():
        assert row["seeds"] == 2
        assert 0 < row["mean"] <= 100  # percent, or times
        assert row["std"] >= 0
    assert set(rows) <= found.keys()


class TestCompression:
    @pytest.fixture
    def study(self):
        rq2 = pytest.importorskip("bench.study.rq2")
        model = nn.Sequential(
            nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3),
            nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
        ).eval()  # fmt: skip
        batches = small_digits().batches(small_digits().train[:400], 50)
        subject = rq2.Subject("small", model, lambda steps: batches, batches, batches, batches, 0.1)
        return rq2.Study(subject, rq2.FULL, None)

    def test_every_importance_leaves_the_same_cost(self, study):
        from bench.study import rq2

        whole, _ = rq2.cost_of(study.subject.model, study.subject.calibration)
        assert study.pruners() == list(rq2.PRUNERS)
        for name in study.pruners():
            macs, _ = rq2.cost_of(study.cut(name), study.subject.calibration)
            assert macs == study.peers[1] <= rq2.MACS * whole

    def test_ours_has_no_more_multiply_adds_left(self, study):
        from bench.study import rq2

        macs, _ = rq2.cost_of(study.cut(rq2.OURS), study.subject.calibration)
        assert macs <= study.peers[1]

    def test_a_layer_without_a_norm_has_no_scales_to_rank_by(self, study):
        study.subject.model[1] = nn.Identity()
        assert "BN scale" not in study.pruners()

    def test_a_network_that_keeps_its_layers_is_compressed_once(self, study, monkeypatch):
        from bench import compression

        runs = []

        def run(study, method, granularity, first):
            runs.append(first)
            return {"rate": 2.0, "iterations": 3, "accuracy": 90.0, "begun": None}

        monkeypatch.setattr(compression.Study, "run", run)
        layers, alone = (study.compressed("lamp", first) for first in ("layers", "nothing"))
        assert runs == ["nothing"]
        assert layers == {**alone, "begun": 100.0}
