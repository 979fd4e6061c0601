"""What may happen to images or to a network in the study of re-adaptation."""

import pytest
import torch
import torch.nn.functional as F

from bench.cifar import Images
from bench.datasets import small_digits
from bench.study import networks, shifts


@pytest.fixture(scope="module")
def data():
    return small_digits()


@pytest.fixture(scope="module")
def model():
    return networks.DIGITS._train(0).eval()


@pytest.fixture
def photos():
    pixels = torch.randint(0, 256, (6, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    return Images(pixels.byte(), torch.arange(6))


def loss(model, data, images):
    with torch.no_grad():
        answers = model(data.normalised(images.pixels))
    return F.cross_entropy(answers, images.labels, reduction="none")


@pytest.mark.parametrize("attack", [shifts.fgsm, shifts.pgd])
def test_adversarial_images_are_near_and_harder(attack, model, data):
    images = data.test[:60]
    found = attack(model, data, images)
    assert torch.equal(found.labels, images.labels)
    assert found.pixels.dtype == torch.uint8
    assert int(found.pixels.max()) <= data.white
    moved = (found.pixels.short() - images.pixels.short()).abs()
    assert int(moved.max()) == max(1, round(4 / 255 * data.white))
    assert bool((loss(model, data, found) >= loss(model, data, images)).all())
    assert torch.equal(found.pixels, attack(model, data, images).pixels)


def test_stronger_noise_moves_pixels_farther(photos):
    grey = Images(torch.full((8, 3, 32, 32), 128, dtype=torch.uint8), torch.arange(8))
    spread = [float((shifts.noise(grey, s, 255, 0).pixels.double() - 128).std()) for s in (1, 3, 5)]
    assert spread == pytest.approx([0.02 * 255, 0.06 * 255, 0.10 * 255], rel=0.02)
    one, again, other = (shifts.noise(photos, 2, 255, seed).pixels for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_blur_is_a_gaussian_filter(photos):
    at = torch.arange(-2.0, 3.0, dtype=torch.float64)
    for strength, sigma in ((1, 0.4), (5, 1.3)):
        row = torch.exp(-(at**2) / (2 * sigma**2))
        row /= row.sum()
        found = shifts.blur(photos, strength, 255).pixels
        inner = photos.pixels[:, :, 3:8, 4:9].double()  # around the place 5, 6
        expected = torch.einsum("nchw,h,w->nc", inner, row, row)
        assert float((found[:, :, 5, 6].double() - expected).abs().max()) <= 0.51


def test_contrast_draws_towards_the_mean(photos):
    found = shifts.contrast(photos, 4, 255).pixels.double()
    given = photos.pixels.double()
    mean = given.mean((1, 2, 3), keepdim=True)
    assert float((found - mean - 0.2 * (given - mean)).abs().max()) <= 0.51


def test_damage_draws_a_share_of_each_layers_weights_anew(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, large = (shifts.damaged(model, share, 3).state_dict() for share in (0.2, 0.5))
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
        hit, more = (broken[name] != value for broken in (small, large))
        if name.endswith("bias"):
            assert not hit.any()
            continue
        assert bool((more | ~hit).all())
        deviation = (0.2 * 0.8 / value.numel()) ** 0.5
        assert float(hit.double().mean()) == pytest.approx(0.2, abs=4 * deviation)
        assert torch.equal(small[name][hit], large[name][hit])
