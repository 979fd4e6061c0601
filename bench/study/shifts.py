"""What may happen to images, or to a network, so that it has to be re-adapted.

Images stay uint8, so that every shift is one that a file can hold.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cifar import Images
from bench.datasets import Data

STRENGTHS = (1, 2, 3, 4, 5)
_NOISE = (0.02, 0.04, 0.06, 0.08, 0.10)
_BLUR = (0.4, 0.6, 0.8, 1.0, 1.3)
_CONTRAST = (0.6, 0.4, 0.3, 0.2, 0.1)
_REACH = 4 / 255
"""How far an adversarial pixel may be from its own, of white."""
_STEPS = 7
_AT_ONCE = 250


def noise(images: Images, strength: int, white: int, seed: int) -> Images:
    """Gaussian noise, independent for every value."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(images.pixels.shape, generator=generator)
    return _rounded(images, images.pixels + _NOISE[strength - 1] * white * drawn, white)


def blur(images: Images, strength: int, white: int) -> Images:
    """A Gaussian filter of 5 × 5; edges are repeated."""
    at = torch.arange(-2.0, 3.0)
    weights = torch.exp(-((at / _BLUR[strength - 1]) ** 2) / 2)
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    channels = images.pixels.shape[1]
    parts = [
        F.conv2d(
            F.pad(part.float(), (2, 2, 2, 2), mode="replicate"),
            kernel.expand(channels, 1, 5, 5),
            groups=channels,
        )
        for part in images.pixels.split(_AT_ONCE)
    ]
    return _rounded(images, torch.cat(parts), white)


def contrast(images: Images, strength: int, white: int) -> Images:
    """Every value drawn towards its image's mean."""
    pixels = images.pixels.float()
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return _rounded(images, mean + _CONTRAST[strength - 1] * (pixels - mean), white)


def _rounded(images: Images, pixels: Tensor, white: int) -> Images:
    return Images(pixels.round().clamp(0, white).byte(), images.labels)


def fgsm(model: nn.Module, data: Data, images: Images) -> Images:
    """One step of the whole reach along the gradient's sign (Goodfellow et al. 2015)."""
    reach = max(1, round(_REACH * data.white))
    return _attacked(model, data, images, reach, reach, 1)


def pgd(model: nn.Module, data: Data, images: Images) -> Images:
    """Small steps within the same reach (Madry et al. 2018), from the image itself."""
    reach = max(1, round(_REACH * data.white))
    return _attacked(model, data, images, reach, 1, _STEPS)


def _attacked(
    model: nn.Module, data: Data, images: Images, reach: int, step: int, steps: int
) -> Images:
    """Away from the label; ``reach`` and ``step`` are differences of pixels."""
    found = []
    for start in range(0, len(images), _AT_ONCE):
        part = images[start : start + _AT_ONCE]
        own = part.pixels.short()
        pixels = own.clone()
        for _ in range(steps):
            x = data.normalised(pixels.byte()).requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), part.labels), x)
            # Normalising scales each channel by a positive factor, so that signs are those of
            # pixels.
            pixels = pixels + step * gradient.sign().short()
            pixels = torch.minimum(torch.maximum(pixels, own - reach), own + reach)
            pixels = pixels.clamp(0, data.white)
        found.append(pixels.byte())
    return Images(torch.cat(found), images.labels)


@torch.no_grad()
def damaged(model: nn.Module, share: float, seed: int) -> nn.Module:
    """A copy of which a share of each layer's weights, anywhere, was drawn anew with the layer's
    own mean and deviation; a larger share of the same seed holds every smaller one."""
    generator = torch.Generator().manual_seed(seed)
    broken = copy.deepcopy(model)
    for module in broken.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight
            hit = torch.rand(weight.shape, generator=generator) < share
            drawn = torch.randn(weight.shape, generator=generator) * weight.std() + weight.mean()
            weight.copy_(torch.where(hit, drawn, weight))
    return broken
