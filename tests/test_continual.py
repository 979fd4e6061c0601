"""Measures of a sequence of tasks, against matrices worked out by hand."""

import pytest
import torch
from helpers import here
from models import IMAGES, images, loader, settled

import neusemslice as nss
from neusemslice.maintain import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    task_accuracies,
)

NAN = float("nan")
R = torch.tensor([[0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.6, 0.85, 0.95]])
UNTRAINED = torch.tensor([0.5, 0.25, 0.1])


def test_by_hand():
    assert average_accuracy(R) == pytest.approx((0.6 + 0.85 + 0.95) / 3)
    assert backward_transfer(R) == pytest.approx(((0.6 - 0.9) + (0.85 - 0.8)) / 2)
    assert forward_transfer(R, UNTRAINED) == pytest.approx(((0.3 - 0.25) + (0.4 - 0.1)) / 2)
    # The first task was best after it was learned, the second is best at the end.
    assert forgetting(R) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.85)) / 2)


def test_forgetting_is_from_the_best_so_far():
    matrix = torch.tensor([[0.5, NAN, NAN], [0.9, 0.7, NAN], [0.4, 0.7, 0.6]])
    assert forgetting(matrix) == pytest.approx((0.9 - 0.4) / 2)
    assert backward_transfer(matrix) == pytest.approx((0.4 - 0.5) / 2)


def test_one_task():
    one = torch.tensor([[0.75]])
    assert average_accuracy(one) == 0.75
    assert backward_transfer(one) == forgetting(one) == 0.0
    assert forward_transfer(one, torch.tensor([0.1])) == 0.0


def test_refusals():
    with pytest.raises(ValueError, match=r"must be \[T, T\], got \[2, 3\]"):
        average_accuracy(R[:2])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        forward_transfer(torch.tensor([[0.5, NAN], [0.5, 0.5]]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"untrained accuracies must be \[3\], got \[2\]"):
        forward_transfer(R, UNTRAINED[:2])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        backward_transfer(100 * R)


@pytest.mark.pretended
@pytest.mark.usefixtures("device")
def test_accuracies_count_what_the_set_answers():
    old = loader(96)
    model = settled(IMAGES["lenet"](), 1, 8, 8)
    slicing = nss.slice(nss.profile(model, old), threshold=0.6)
    new = [(1.3 - x, y + 4) for x, y in old]
    tasks = nss.extend(model, slicing, new, capacity=0.5, epochs=2).model
    x = images(40, 1, 8, 8, seed=3)
    y = torch.arange(40) % 4 + 4
    y[::5] = -100
    found = task_accuracies(tasks, {"new": [(x[:25], y[:25]), (x[25:], y[25:])]})["new"]
    real = y != -100
    assert found.samples == 32
    right = tasks.task("new")(here(x)).argmax(1).cpu() + 4 == y
    assert found.given == pytest.approx(float(right[real].float().mean()))
    assert found.inferred == pytest.approx(
        float((tasks(here(x)).argmax(1).cpu() == y)[real].float().mean())
    )
    assert found.chosen == pytest.approx(
        float((tasks.choose(here(x)).cpu() == 1)[real].float().mean())
    )
    with pytest.raises(ValueError, match=r"classes of task new are \[4, 5, 6, 7\], got labels \[0"):
        task_accuracies(tasks, {"new": old})
    with pytest.raises(ValueError, match="task new has no labelled sample"):
        task_accuracies(tasks, {"new": [(x, torch.full_like(y, -100))]})
    with pytest.raises(KeyError, match="no task 'birds'"):
        task_accuracies(tasks, {"birds": new})
