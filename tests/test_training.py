"""The shared training loop on the loaders and batches that break simple ones."""

import pytest
import torch
from helpers import here
from models import Mlp, images, loader, settled
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import neusemslice as nss
from neusemslice.maintain import fit, score

pytestmark = pytest.mark.usefixtures("device")

BATCHES = loader(48, shape=(12,))


class Stream(IterableDataset):
    """Samples without a known number."""

    def __iter__(self):
        for x, y in BATCHES:
            yield from zip(x, y, strict=True)


def trained(model, batches, epochs=2, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return fit(model, batches, optimizer, epochs, what="fit", **options)


def test_a_loader_without_a_length():
    stream = DataLoader(Stream(), 8)
    model = settled(Mlp(), 12)
    training = trained(model, stream, epochs=3)
    assert training.steps == 18
    assert training.losses[-1] < training.losses[0]
    slicing = nss.slice(nss.profile(model, stream))
    assert nss.readapt(model, slicing, stream, budget=0.5, epochs=1).report.training.steps == 6


def test_a_batch_without_a_label_changes_nothing():
    model = settled(Mlp(), 12)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    training = trained(model, [(x, torch.full_like(y, -100)) for x, y in BATCHES])
    assert training.losses == (0.0, 0.0)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_labels_that_the_model_does_not_have():
    with pytest.raises(
        ValueError, match=r"fit: labels must be among \[0, 1, 2, 3\] or -100, got \[4\]"
    ):
        trained(settled(Mlp(), 12), [(images(2, 12), torch.tensor([0, 4]))])


def test_works_under_no_grad_and_restores_everything():
    model = settled(Mlp(), 12).eval()
    model.first.bias.requires_grad_(False)
    with torch.no_grad():
        trained(model, BATCHES)
    assert not model.training
    assert not model.first.bias.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(16), nn.InstanceNorm1d(16, track_running_stats=True)]
)
def test_statistics_stay_when_frozen(norm):
    class Normed(Mlp):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            hidden = self.norm(self.first(x).unsqueeze(2).expand(-1, -1, 3)).mean(2)
            return self.head(self.second(hidden.relu()).relu())

    model = here(Normed())
    before = {k: v.clone() for k, v in model.named_buffers()}
    trained(model, BATCHES)
    for key, value in model.named_buffers():
        assert torch.equal(value, before[key]), key


@pytest.mark.pretended
def test_a_batch_with_one_along_is_one_batch():
    """The step is that of both put together; the shorter loader begins anew."""
    model, other = (here(Mlp().double()) for _ in range(2))
    other.load_state_dict(model.state_dict())
    first = [(images(5, 12, seed=i).double(), torch.arange(5) % 4) for i in range(3)]
    second = [(images(3, 12, seed=9 + i).double(), torch.tensor([0, -100, 3])) for i in range(2)]
    pairs = zip(first, [*second, second[0]], strict=True)
    joined = [tuple(torch.cat(part) for part in zip(*both, strict=True)) for both in pairs]
    one = trained(model, first, along=second)
    two = trained(other, joined)
    assert one.steps == two.steps == 6
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], rtol=1e-12, atol=1e-14)
    assert one.losses == pytest.approx(two.losses, rel=1e-6)


def test_scores_count_labelled_samples_only():
    model = settled(Mlp(), 12).train()
    x, y = images(20, 12), torch.arange(20) % 5 - 1
    y[y < 0] = -100
    found = score(model, [(x[:13], y[:13]), (x[13:], y[13:])], "test")
    known = y >= 0
    with torch.no_grad():
        logits = model(here(x[known])).double().cpu()
    assert found.samples == int(known.sum()) == 16
    assert found.accuracy == float((logits.argmax(1) == y[known]).double().mean())
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, y[known])))
    assert model.training
    with pytest.raises(ValueError, match="test: there is no labelled sample"):
        score(model, [(x, torch.full_like(y, -100))], "test")


def test_a_loss_that_is_not_finite_is_said():
    model = settled(Mlp(), 12)
    with pytest.raises(ValueError, match="fit: the loss of epoch 1 is not finite"):
        trained(model, [(torch.full((2, 12), torch.inf), torch.tensor([0, 1]))])


def test_extension_with_a_last_batch_of_one():
    from models import lenet

    model = settled(lenet(), 1, 8, 8)
    old = loader(50)
    slicing = nss.slice(nss.profile(model, old))
    ragged = [
        (images(8, 1, 8, 8), torch.arange(8) % 2 + 4),
        (images(1, 1, 8, 8), torch.tensor([4])),
    ]
    assert nss.extend(model, slicing, ragged, capacity=0.5, epochs=2).report.unchanged
