"""The tables of what restructuring did."""

import io

import pytest
import torch
from helpers import here
from models import Mlp, images, loader
from restructured import case
from rich.console import Console

from neusemslice.report import class_accuracy, print_restructured, removed_components
from neusemslice.slicing import Slice

pytestmark = pytest.mark.usefixtures("device")

NAMES = ("cat", "dog", "owl", "bee")


def printed(made, tmp_path, **options):
    console = Console(file=io.StringIO(), width=140)
    paths = [tmp_path / "model.safetensors"]
    print_restructured(made.small, made.slicing, paths, console, **options)
    return console.file.getvalue()


def test_it_says_what_is_left_and_what_went(tmp_path):
    made = case("residual")
    accuracy = class_accuracy(made.model, made.small.model, made.batches, NAMES)
    text = printed(made, tmp_path, accuracy=accuracy)
    before, after = made.small.report.before, made.small.report.after
    site, widths = next(iter(made.small.report.widths.items()))
    refit = next(iter(made.small.report.refits.values()))
    component, removed = removed_components(made.slicing, made.small.kept)[0]
    for expected in (
        *(f"{cost.macs:,}" for cost in (before, after)),
        *(f"{cost.parameters:,}" for cost in (before, after)),
        *(f"{cost.latency[size] * 1e3:,.2f} ms" for cost in (before, after) for size in (1, 64)),
        f"{after.macs / before.macs:.0%}",
        f"{after.model_bytes / 1000:,.1f} kB",
        site,
        f"{widths[0]}",
        f"{refit.before:.2%}",
        f"{removed / component.neurons:.0%}",
        "accuracy on 96 samples",
        f"{accuracy.overall[1]:.1%}",
        "owl",
        f"{int(accuracy.after[2]) / 24:.1%}",
        "model.safetensors",
    ):
        assert expected in text, expected


def test_groups_that_cannot_lose_neurons_are_said(tmp_path):
    text = printed(case("padded", compensate=False), tmp_path)
    assert "kept whole: stem, conv2: " in text
    assert "accuracy" not in text
    assert "Compensated" not in text


def test_accuracy_is_counted_by_class():
    first, second = here(Mlp()), here(Mlp())
    batches = [*loader(30, shape=(12,)), (images(3, 12), torch.tensor([-100, 2, 2]))]
    found = class_accuracy(first, second, batches, NAMES)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    for model, right in ((first, found.before), (second, found.after)):
        answer = model(here(x)).argmax(1).cpu()
        assert right.tolist() == [int(((answer == k) & (y == k)).sum()) for k in range(4)]
    assert found.samples.tolist() == [int((y == k).sum()) for k in range(4)]
    right = int((first(here(x)).argmax(1).cpu() == y).sum())
    assert found.overall[0] == pytest.approx(right / 32)
    with pytest.raises(ValueError, match="an iterator is used up after one"):
        class_accuracy(first, second, iter(batches), NAMES)


def test_removed_components_are_counted():
    made = case("lenet")
    found = removed_components(made.slicing, made.small.kept)
    for component, removed in found:
        expected = sum(
            int(((numbers == component.number) & ~made.small.kept.mask(site)).sum())
            for site, numbers in made.slicing.components.items()
        )
        assert removed == expected
    shares = [removed / component.neurons for component, removed in found]
    assert shares == sorted(shares, reverse=True)
    whole = Slice.whole(made.small.kept.graph)
    assert all(removed == 0 for _, removed in removed_components(made.slicing, whole))
