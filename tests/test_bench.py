"""What the benchmarks write, and that the ways that they compare do the same."""

import json
import subprocess

import numpy as np
import pytest
import torch
from helpers import quick

from bench import gram, masked_optim, mnist, report, rows
from bench.report import Column, Ratio, Result, Section
from bench.slicing import Curve, compared
from neusemslice import _C

COLUMNS = (
    Column("ms", "ms", "number"),
    Column("limit", "of limit", "share", in_summary=True),
    Column("vs_plain", "× plain", "times", in_summary=True),
    Column("strongest", "strongest", "text"),
)


def section(key: str, limit: float) -> Section:
    values = {"ms": 1.5, "limit": Ratio(limit, 0.4, 0.6), "strongest": "index_add_"}
    return Section(key, f"Title of {key}", "A note.", COLUMNS, [Result("fp32 K=10", values)])


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_the_last_line_holds_what_a_workload_has():
    assert json.loads(section("a", 0.5).summary()) == {"fp32 K=10": {"limit": 0.5}}


def test_ratios_are_medians_with_quartiles():
    assert Ratio.of([3.0, 1.0, 2.0]) == Ratio(2.0, 1.5, 2.5)


def test_a_section_replaces_itself_and_leaves_the_others(results):
    section("a", 0.5).write()
    section("b", 0.7).write()
    page = section("a", 0.9).write()
    found = json.loads(page.with_suffix(".json").read_text())
    assert found["machine"]["processor"]
    limits = {
        key: part["results"][0]["values"]["limit"]["median"]
        for key, part in found["sections"].items()
    }
    assert limits == {"a": 0.9, "b": 0.7}
    for part in found["sections"].values():
        assert part["torch"]
        assert part["commit"]
        assert part["date"]
    text = page.read_text()
    assert "## Title of a" in text
    assert "| fp32 K=10 | 1.50 | 90.0% (40.0% … 60.0%) | – | index_add_ |" in text


class TestCurves:
    def test_are_interpolated_between_measured_points_only(self):
        curve = Curve.of([(0.3, 0.5), (0.1, 0.8), (0.1, 1.0)])
        found = curve.at(np.array([0.05, 0.1, 0.2, 0.3, 0.31]))
        np.testing.assert_allclose(found, [np.nan, 0.9, 0.7, 0.5, np.nan])

    def test_are_compared_where_one_of_them_is_useful(self):
        mine = Curve.of([(0.01, 0.9), (0.11, 0.7), (0.5, 0.1)])
        low = Curve.of([(0.02, 0.45), (0.04, 0.45)])
        high = Curve.of([(0.11, 1.0), (0.12, 0.01)])
        found = compared([mine], [low], [high])
        ratio = found["vs_global"]
        assert ratio.median == pytest.approx(0.86 / 0.45)
        assert found["vs_category"].low == pytest.approx(0.7)
        assert found["below"] == "11 %"


@pytest.mark.slow
@pytest.mark.skipif(mnist.missing() is not None, reason=str(mnist.missing()))
def test_the_study_of_slices_ends_with_its_summary():
    summary = quick("bench.slicing")
    assert set(summary["LeNet-5, MNIST: taylor, semantic"]) == {"vs_global", "vs_category"}


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("kind", masked_optim.KINDS)
def test_all_ways_to_tune_rows_are_compared_and_agree(kind, share):
    workloads = masked_optim.workloads("small", masked_optim.KINDS[kind], 2, 32, share, rotated=0)
    operator, step = workloads
    assert set(operator.peers) == {"rows"}
    assert set(step.peers) == {"hook", "correct", "fused"}
    for workload in workloads:
        workload.check()
        for way in (workload.ours, *(run for of in workload.peers.values() for run in of.values())):
            way(0)


class TestStreamedRows:
    """What masked optimizers are compared with moves all that they move, and nothing else."""

    def test_rows_and_state_are_rewritten(self):
        given = torch.Generator().manual_seed(0)
        read, update = (
            [torch.randint(99, shape, generator=given) for shape in ((5, 16), (3, 32))]
            for _ in range(2)
        )
        rows = [torch.tensor([0, 3, 4]), torch.tensor([1])]
        state = [torch.zeros(3 * 2, 16, dtype=torch.int64), torch.zeros(1, 32, dtype=torch.int64)]
        expected = [
            u.index_copy(0, r, u[r] ^ x[r]) for u, x, r in zip(update, read, rows, strict=True)
        ]
        _C.stream_rows(read, update, rows, state)
        assert all(map(torch.equal, update, expected))
        assert all(bool((t == 1).all()) for t in state)

    @pytest.mark.parametrize(
        ("rows", "state", "message"),
        [([5], 16, "no row 5"), ([-1], 16, "no row -1"), ([0], 15, "does not fit")],
    )
    def test_refuses(self, rows, state, message):
        matrix = torch.zeros(5, 16, dtype=torch.int64)
        state = torch.zeros(state, dtype=torch.int64)
        with pytest.raises(ValueError, match=message):
            _C.stream_rows([matrix], [matrix.clone()], [torch.tensor(rows)], [state])


@pytest.mark.parametrize("layer", [*rows.LAYERS.values(), *rows.LAYERS_ON_GPU.values()])
def test_gradients_of_rows_are_compared_and_agree(layer):
    """Of every layer that is measured, in few samples of small planes."""
    size = None if layer.size is None else 5
    few = rows.Layer(3, layer.inputs // 4, layer.outputs // 4, size, max(1, layer.groups // 4))
    result = rows.measure("x", few, 0.25, rounds=2, patience=0)
    assert {"ms", "limit", "vs_whole"} <= result.values.keys()
    assert ("vs_gathered" in result.values) == (layer.groups == 1)


@pytest.mark.parametrize("features", [40, 289])
def test_gram_matrices_are_compared_and_agree(features):
    result = gram.measure("x", 2100, features, rounds=2, patience=0)
    assert {"limit", "vs_float64", "vs_float32"} <= result.values.keys()


def test_a_step_of_readaptation_is_measured():
    readapt_step = pytest.importorskip("bench.readapt_step")
    result = readapt_step.measure("ResNet-20", readapt_step.resnet20(2), 0.25, rounds=2)
    assert result.name == "ResNet-20 25%"
    assert {"vs_full", "vs_hook", "vs_lora", "memory"} <= result.values.keys()
    # State is held for tuned rows alone, beside each row's number of steps.
    tuned = result.values["tuned"].median
    assert 0.9 / tuned < result.values["memory"].median < 1.1 / tuned
    assert [len(result.values[key].split(" / ")) for key in ("states", "peaks")] == [3, 3]


def test_the_commit_of_results_is_that_of_all_else(tmp_path, monkeypatch):
    monkeypatch.delenv("NSS_COMMIT", raising=False)
    folder = tmp_path / "bench"
    measured, result = folder / "ours.py", folder / "results" / "table.md"
    result.parent.mkdir(parents=True)
    assert report._commit(folder) == "unknown"

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *who, *arguments]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    for path in (measured, result):
        path.write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "--short", "HEAD")
    result.write_text("after")
    assert report._commit(folder) == head
    measured.write_text("after")
    assert report._commit(folder) == f"{head}-dirty"
