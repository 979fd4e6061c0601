"""CIFAR-10 as JPEG and the residual networks trained on it, for benchmarks and tests on real data.

Both lie outside the package, in ``../shared/data``; what needs them skips where they are absent.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DATA = Path(__file__).parents[2] / "shared" / "data"
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

CACHE = Path(__file__).parents[1] / "build" / "data"
"""Where what is made of the data is kept."""
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
_DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Images:
    """Images uint8 ``[N, C, H, W]``, of CIFAR-10 ``[N, 3, 32, 32]``, and labels int64 ``[N]``."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor | slice) -> Images:
        return Images(self.pixels[chosen], self.labels[chosen])

    def of(self, classes: tuple[int, ...]) -> Images:
        """Those of some classes."""
        return self[torch.isin(self.labels, torch.tensor(classes))]

    def inputs(self) -> Tensor:
        """What the networks take: float32, normalised."""
        return normalised(self.pixels)

    def batches(self, size: int = 250) -> list[tuple[Tensor, Tensor]]:
        """In order, the last one may be smaller."""
        return [
            (normalised(self.pixels[i : i + size]), self.labels[i : i + size])
            for i in range(0, len(self), size)
        ]


def normalised(pixels: Tensor) -> Tensor:
    """uint8 ``[N, 3, H, W]`` as the networks were trained on it."""
    return (pixels.float() / 255 - _MEAN) / _DEVIATION


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored by chance and moved by up to four pixels, uint8."""
    n, _, height, width = pixels.shape
    mirrored = torch.rand(n, generator=generator) < 0.5
    pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(3), pixels)
    padded = F.pad(pixels, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, n), generator=generator)
    rows = down.view(-1, 1) + torch.arange(height)
    cols = right.view(-1, 1) + torch.arange(width)
    sample = torch.arange(n).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[sample, rows.unsqueeze(2), cols.unsqueeze(1)].permute(
        0, 3, 1, 2
    )


def prepared(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Augmented and normalised, for training."""
    return normalised(augmented(pixels, generator))


def missing() -> str | None:
    """Why the data cannot be used here; None if it can."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return "pyarrow is not installed"
    folder = DATA / "cifar10"
    return None if folder.is_dir() else f"there is no {folder.name} in {DATA.parent.name}/data"


def load(split: str) -> Images:
    """All images of ``"train"`` (50,000) or ``"test"`` (10,000); decoded once and then kept.

    Raises:
        FileNotFoundError: if the data is absent.
    """
    cached = CACHE / f"cifar10-{split}.safetensors"
    if not cached.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        decoded = cached.with_suffix(".new")
        save_file(_decode(DATA / "cifar10" / f"{split}-00000-of-00001.parquet"), decoded)
        decoded.rename(cached)
    tensors = load_file(cached)
    return Images(tensors["pixels"], tensors["labels"])


def _decode(path: Path) -> dict[str, Tensor]:
    import pyarrow.parquet as parquet
    from PIL import Image

    table = parquet.read_table(path)
    coded = table["img"].combine_chunks().field("bytes").to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(c)).convert("RGB")) for c in coded])
    return {
        "pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        "labels": torch.from_numpy(table["label"].to_numpy().copy()),
    }


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.added = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.added:
            half = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(out + x)


class ResNet(nn.Module):
    """The residual network for CIFAR of ``6 · blocks + 2`` layers."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = Block(inputs, outputs, stride)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


def trained(name: str) -> ResNet:
    """A trained network in evaluation mode: ``"resnet20_cifar10"``, ``"resnet56_cifar10"`` (both
    of the original images) or ``"resnet20_cifar10_jpeg"``.

    Raises:
        FileNotFoundError: if there is none of that name.
    """
    model = ResNet(9 if name.startswith("resnet56") else 3)
    tensors = load_file(DATA / "models" / f"{name}.safetensors")
    missing_keys, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or any(not key.endswith("num_batches_tracked") for key in missing_keys):
        raise ValueError(f"{name} does not fit: missing {missing_keys}, unexpected {unexpected}")
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of images that the model, as it stands, answers rightly."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in images.batches())
    return right / len(images)
