"""What slices, their complements and random slices answer alone."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import here
from models import Mlp, images, loader, settled
from rich.console import Console
from torch import nn

import neusemslice as nss
from neusemslice import Slice, data
from neusemslice.profiling import METRICS

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"


def by_hand() -> tuple[nn.Module, nss.SemanticSlicing, list]:
    """Four neurons; 0 and 1 answer for one class each, and nothing reads 2 and 3."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 1]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]))
        model[2].bias.copy_(torch.tensor([0.1, 0.0]))
    here(model)
    x = torch.eye(2).repeat(3, 1)
    batches = [(x, torch.tensor([0, 1, 0, 1, 0, -100]))]

    def score(profile, site):
        return torch.tensor([[0.6, 0.0, 0.3, 0.1], [0.0, 0.6, 0.3, 0.1]])

    return model, nss.slice(nss.profile(model, batches), score, threshold=0.6), batches


@pytest.mark.usefixtures("device")
class TestByHand:
    @pytest.mark.pretended
    def test_accuracies(self):
        model, slicing, batches = by_hand()
        found = nss.faithfulness(model, slicing, batches, thresholds=(0.6, 0.9, 1.0), draws=400)
        assert found.metric == "score"
        assert found.samples.tolist() == [3, 2]
        assert found.density.tolist() == [0.5, 0.75, 1.0]
        assert found.whole.tolist() == [1, 1]
        assert found.kept.tolist() == [[1, 1], [1, 1], [1, 1]]
        # Without its neuron class 1 is taken for class 0, whose bias is larger.
        assert found.dropped.tolist() == [[1, 0], [1, 0], [1, 0]]
        assert (found.random[..., 0] == 1).all()
        assert set(found.random[0, :, 1].tolist()) == {0, 1}
        # Class 1 is right whenever its neuron is among the two of four, or the three.
        for t, share in enumerate((0.5, 0.75)):
            deviation = (share * (1 - share) / 400) ** 0.5
            assert abs(found.random[t, :, 1].mean() - share) < 4 * deviation
        overall, spread = found.chance()
        assert overall[2] == 1
        assert spread[2] == 0
        assert found.over_classes(found.dropped).tolist() == pytest.approx([0.6] * 3)

    def test_the_same_each_time_and_other_draws_for_another_seed(self):
        model, slicing, batches = by_hand()
        one, two, other = (
            nss.faithfulness(model, slicing, batches, thresholds=[0.6], draws=20, seed=seed)
            for seed in (0, 0, 1)
        )
        assert torch.equal(one.random, two.random)
        assert not torch.equal(one.random, other.random)

    def test_random_slices_have_as_many_neurons_at_every_site(self, monkeypatch):
        torch.manual_seed(0)
        model = settled(Mlp(), 12)
        batches = loader(shape=(12,))
        slicing = nss.slice(nss.profile(model, batches), threshold=0.8)
        seen = []
        masking = Slice.masking
        monkeypatch.setattr(Slice, "masking", lambda s, m: (seen.append(s), masking(s, m))[1])
        nss.faithfulness(model, slicing, batches, thresholds=[0.8], draws=3)
        whole, kept, dropped, *draws = seen
        assert whole == Slice.whole(slicing.profile.graph)
        assert kept == slicing.critical_slice()
        assert dropped == ~kept
        assert len(set(draws)) == 3
        for draw in draws:
            for site, mask in draw.masks().items():
                assert mask.sum() == kept.mask(site).sum()

    def test_the_slicings_own_threshold_is_among_the_default_ones(self):
        model, slicing, batches = by_hand()
        found = nss.faithfulness(model, slicing, batches, draws=1)
        assert found.thresholds == (0.5, 0.6, 0.7, 0.9)
        assert found.chance()[1].isnan().all()

    def test_the_model_is_left_as_it_was(self):
        model, slicing, batches = by_hand()
        model.train()
        before = copy.deepcopy(model.state_dict())
        nss.faithfulness(model, slicing, batches, draws=1)
        assert model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(m._forward_pre_hooks for m in model.modules())

    def test_a_class_without_samples_has_no_accuracy(self):
        model, slicing, _ = by_hand()
        found = nss.faithfulness(model, slicing, [(torch.eye(2), [0, -100])], draws=2)
        assert found.whole.isnan().tolist() == [False, True]
        assert found.over_classes(found.whole) == 1

    def test_labels_of_tokens(self):
        class Each(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

            def forward(self, x):
                return self.head(self.inner(x).relu())

        torch.manual_seed(0)
        model, x = here(Each()), images(4, 5, 12)
        with torch.no_grad():
            y = model(here(x)).argmax(-1).cpu()
        slicing = nss.slice(nss.profile(model, [(x, y)]))
        found = nss.faithfulness(model, slicing, [(x, y)], draws=1)
        assert found.samples.sum() == 20
        assert found.over_classes(found.whole) == pytest.approx(1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"thresholds": [0.5, 1.5]}, r"thresholds must lie in \(0, 1\], got \[0.5, 1.5\]"),
            ({"thresholds": []}, "thresholds must lie in"),
            ({"draws": 0}, "draws must be at least 1, got 0"),
            ({"loader": iter([])}, "an iterator is used up"),
            ({"loader": [(torch.eye(2), [0, 2])]}, r"labels must lie in \[0, 2\)"),
            ({"loader": [(torch.eye(2), [[0], [1]])]}, r"\[2\] answers to labels \[2, 1\]"),
            ({"loader": [(torch.eye(2), [-100, -100])]}, "no sample with a label"),
            ({"model": nn.Linear(2, 2)}, "belongs to another model"),
        ],
    )
    def test_refusals(self, options, message):
        model, slicing, batches = by_hand()
        given = {"model": model, "loader": batches} | options
        with pytest.raises(ValueError, match=message):
            nss.faithfulness(given.pop("model"), slicing, given.pop("loader"), **given)


class TestShown:
    def found(self):
        model, slicing, batches = by_hand()
        slicing.profile.class_names = ("cat", "dog")
        return nss.faithfulness(model, slicing, batches, thresholds=(0.6, 1.0), draws=4)

    def test_as_a_table(self):
        console = Console(file=io.StringIO(), width=100)
        console.print(self.found().table())
        shown = console.file.getvalue()
        for text in ("by score", "θ = 0.6", "50.0%", "cat", "dog", "100.0%", "60.0%", "±"):
            assert text in shown

    def test_many_classes_are_those_that_lose_most(self):
        torch.manual_seed(0)
        model = settled(Mlp(outputs=30), 12)
        batches = loader(90, classes=30, shape=(12,))
        slicing = nss.slice(nss.profile(model, batches))
        table = nss.faithfulness(model, slicing, batches, thresholds=[0.5], draws=1).table()
        assert table.row_count == 21

    def test_as_a_figure(self, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        path = self.found().figure(tmp_path / "figure.png")
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def digits():
    """A network that reads MNIST, its profile by all metrics, and images that it has not seen."""
    given = data.load_mnist(MNIST)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 25, 64),
        nn.GELU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x, y = given.train_images[:10_000], given.train_labels[:10_000]
    for _ in range(2):
        for part in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    model.eval()
    train = list(zip(x[:2000].split(250), y[:2000].split(250), strict=True))
    held_out = given.test_images[:2000], given.test_labels[:2000]
    test = list(zip(*(part.split(500) for part in held_out), strict=True))
    return model, nss.profile(model, train, METRICS, baseline="mean"), test


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not beside the project")
@pytest.mark.parametrize("metric", ["taylor", "deeplift"])
def test_slices_answer_and_their_complements_do_not(digits, metric):
    model, profile, test = digits
    slicing = nss.slice(profile, metric)
    found = nss.faithfulness(model, slicing, test, thresholds=(0.3, 0.4), draws=5)
    kept, dropped = found.over_classes(found.kept), found.over_classes(found.dropped)
    chance, _ = found.chance()
    assert found.over_classes(found.whole) > 0.95
    assert (found.density < 0.9).all()
    assert (kept > chance + 0.15).all(), (kept, chance)
    assert (kept > dropped + 0.4).all(), (kept, dropped)
