"""What the benchmarks write."""

import json

import pytest

from bench import report
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


def test_a_step_of_readaptation_is_measured():
    readapt_step = pytest.importorskip("bench.readapt_step")
    result = readapt_step.measure("ResNet-20", readapt_step.resnet20(2), 0.25, rounds=2)
    assert result.name == "ResNet-20 25%"
    assert {"vs_full", "vs_hook", "vs_lora", "memory"} <= result.values.keys()
    # State is held for tuned rows alone, beside each row's number of steps.
    tuned = result.values["tuned"].median
    assert 0.9 / tuned < result.values["memory"].median < 1.1 / tuned
