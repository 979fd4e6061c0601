"""Fine-tuning against a loop written out, with and without a teacher."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import here
from models import IMAGES, Mlp, images, loader, settled

from neusemslice.maintain import finetune

pytestmark = pytest.mark.usefixtures("device")

BATCHES = loader(48, shape=(12,))


def oracle(model, teacher, epochs, lr, decay, temperature, soft):
    """The same training with torch's own optimizer, one loss written out."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}], lr=lr
    )
    total = epochs * len(BATCHES)
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / total)
        x, y = (here(part) for part in BATCHES[step % len(BATCHES)])
        z = model(x.double())
        loss = F.cross_entropy(z, y)
        if teacher is not None:
            with torch.no_grad():
                p = (teacher(x.double()) / temperature).softmax(1)
            q = (z / temperature).softmax(1)
            divergence = (p * (p / q).log()).sum(1).mean()
            loss = (1 - soft) * loss + soft * temperature**2 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.pretended
@pytest.mark.parametrize("taught", [False, True])
def test_is_the_loop_written_out(taught):
    from neusemslice.maintain.finetune import SOFT

    model, teacher = here(Mlp().double()), here(Mlp(hidden=20).double())
    expected = copy.deepcopy(model)
    before = copy.deepcopy(teacher.state_dict())
    options = {"teacher": teacher, "temperature": 3.0} if taught else {}
    batches = [(x.double(), y) for x, y in BATCHES]
    training = finetune(model, batches, epochs=2, lr=0.01, weight_decay=0.1, **options)
    oracle(expected, teacher if taught else None, 2, 0.01, 0.1, 3.0, SOFT)
    assert training.steps == 2 * len(BATCHES)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-9, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_teacher_is_followed_where_labels_say_nothing():
    """Its soft answers bring the model nearer to it than labels alone do."""
    teacher = settled(Mlp(), 12)
    x = here(torch.cat([x for x, _ in BATCHES]))
    away = {}
    for taught in (None, teacher):
        torch.manual_seed(1)
        model = here(Mlp())
        finetune(model, BATCHES, epochs=30, lr=0.01, teacher=taught)
        with torch.no_grad():
            away[taught] = float((model(x).softmax(1) - teacher(x).softmax(1)).abs().mean())
    assert away[teacher] < 0.5 * away[None]


def test_statistics_move_and_frozen_parameters_and_modes_stay():
    model, teacher = (settled(IMAGES["residual"](), 1, 8, 8) for _ in range(2))
    model.stem.weight.requires_grad_(False)
    teacher.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    statistics = teacher.stem_bn.running_mean.clone()
    finetune(model, loader(), epochs=1, teacher=teacher)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(before) - {"stem.weight"}
    assert torch.equal(teacher.stem_bn.running_mean, statistics)
    assert teacher.training
    assert not model.training
    assert not model.stem.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "finetune: lr must be positive, got 0.0"),
        ({"temperature": -1.0}, "finetune: temperature must be positive, got -1.0"),
        ({"epochs": 0}, "finetune: epochs must be at least 1, got 0"),
        (
            {"teacher": 5},
            r"teacher must answer in the model's shape \[7, 4\], got \[7, 5\]",
        ),
    ],
)
def test_refusals(options, message):
    model = settled(Mlp(), 12)
    before = copy.deepcopy(model.state_dict())
    if "teacher" in options:
        options = {"teacher": here(Mlp(outputs=options["teacher"]))}
    with pytest.raises(ValueError, match=message):
        finetune(model, BATCHES, **{"epochs": 1} | options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_nothing_to_train():
    model = here(Mlp()).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        finetune(model, [(images(4, 12), torch.arange(4))], epochs=1)
