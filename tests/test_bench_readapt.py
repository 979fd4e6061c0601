"""The study of re-adaptation: it runs, goes on behind what it has done, and keeps images apart."""

import json

import pytest
from helpers import quick

from bench import cifar
from bench.report import Column, Result, Section

pytest.importorskip("peft")
from bench import readapt

needs_images = pytest.mark.skipif(cifar.missing() is not None, reason=str(cifar.missing()))


def test_numbers_are_in_the_last_line_too():
    columns = (Column("mean", "accuracy %", "number", in_summary=True),)
    found = Section("c", "C", "", columns, [Result("ours", {"mean": 87.5})])
    assert json.loads(found.summary()) == {"ours": {"mean": 87.5}}


@pytest.mark.slow
@needs_images
def test_the_quick_study_compares_all_methods():
    found = quick("bench.readapt")
    many, few = readapt.QUICK.settings
    for method in readapt.METHODS:
        for setting in (many, few):
            values = found[f"{setting.name}: {method}"]
            assert {"mean", "against_full", "vs_full"} <= values.keys()
            assert ("lost" in values) == (setting is few)


@needs_images
def test_a_finished_run_is_not_repeated(tmp_path):
    kept = tmp_path / "kept.json"
    assert readapt.Study(readapt.QUICK, kept).once("a", lambda: 1) == 1
    assert readapt.Study(readapt.QUICK, kept).once("a", lambda: 2) == 1


@needs_images
def test_no_choice_is_judged_on_images_of_the_table():
    study = readapt.Study(readapt.QUICK, None)
    held, shown = (
        {row.numpy().tobytes() for row in images.pixels}
        for images in (study.validation, study.test)
    )
    assert len(held) > 45
    assert not shown & held
