"""The table of what re-adaptation did."""

import io

import pytest
from models import IMAGES, loader, settled
from rich.console import Console

import neusemslice as nss
from neusemslice.report import print_readapted

pytestmark = pytest.mark.usefixtures("device")

BATCHES = loader(96)
SHIFTED = [(x * 1.5 + 0.7, y) for x, y in BATCHES]


def printed(tmp_path, **options):
    model = settled(IMAGES["residual"](), 1, 8, 8)
    slicing = nss.slice(nss.profile(model, BATCHES), threshold=0.9)
    result = nss.readapt(model, slicing, SHIFTED, 0.4, epochs=2, **options)
    console = Console(file=io.StringIO(), width=120)
    print_readapted(result, [tmp_path / "delta.safetensors"], console)
    return result, console.file.getvalue()


def test_it_says_what_was_tuned_and_what_it_gave(tmp_path):
    result, text = printed(tmp_path, old=BATCHES, validation=0.25)
    report = result.report
    for expected in (
        f"accuracy on {report.new_before.samples} new samples",
        f"accuracy on {report.old_before.samples} old samples",
        f"{report.old_after.accuracy:.1%}",
        f"{len(result.tuned)} = {report.tuned_neurons:.1%}",
        f"{report.tuned_parameters:,}",
        f"{report.training.optimizer_bytes:,} B",
        f"{result.delta.nbytes:,} B",
        f"{report.training.steps_per_second:.1f}",
        f"component {report.components[0]} ",
        f"drift {report.drift[report.components[0]]:.2f}",
        "delta.safetensors",
    ):
        assert expected in text


def test_what_was_not_scored_is_left_out(tmp_path):
    _, text = printed(tmp_path, validation=None)
    assert "accuracy" not in text
