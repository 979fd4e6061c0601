"""What the benchmarks write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cifar, report
from bench.report import Column, Ratio, Result, Section

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


def test_numbers_are_in_the_last_line_too():
    columns = (Column("mean", "accuracy %", "number", in_summary=True),)
    found = Section("c", "C", "", columns, [Result("ours", {"mean": 87.5})])
    assert json.loads(found.summary()) == {"ours": {"mean": 87.5}}


@pytest.mark.slow
@pytest.mark.skipif(cifar.missing() is not None, reason=str(cifar.missing()))
def test_the_quick_study_of_readaptation_compares_all_methods():
    result = subprocess.run(
        [sys.executable, "-m", "bench.readapt", "--quick"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for method in ("ours", "full", "last layer", "random neurons", "batch norms", "LoRA"):
        for name in ("500 new samples, 3 steps", "100 new samples, 2 steps"):
            values = found[f"ResNet-20, {name}: {method}"]
            assert {"mean", "against_full", "vs_full"} <= values.keys()
        assert "lost" in values


class TestStudy:
    @pytest.fixture
    def study(self, monkeypatch, tmp_path):
        pytest.importorskip("peft")
        if reason := cifar.missing():
            pytest.skip(reason)
        from bench import readapt

        return readapt.Study(readapt.QUICK, tmp_path / "kept.json")

    def test_a_finished_run_is_not_repeated(self, study):
        from bench import readapt

        assert study.once("a", lambda: 1) == 1
        assert readapt.Study(readapt.QUICK, study.kept).once("a", lambda: 2) == 1

    def test_validation_images_are_trained_on_by_no_search(self, study):
        searched = {row.numpy().tobytes() for row in study.searched.pixels}
        held = {row.numpy().tobytes() for row in study.validation.pixels}
        assert len(held) > 90
        assert not searched & held
