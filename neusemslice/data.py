"""The demo's data: scikit-learn's bundled digits, or MNIST's idx files from a folder."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_MNIST = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class ImageData:
    """Images float32 ``[N, 1, H, W]`` in 0…1 and labels int64 ``[N]``, for training and testing."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> ImageData:
    """1,797 scans of handwritten digits, 8 × 8, that scikit-learn ships; every fifth held out.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the demo's digits come with scikit-learn; pip install 'neusemslice[demo]'"
        ) from error
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    held_out = torch.arange(len(labels)) % 5 == 0
    return ImageData(
        "scikit-learn's digits",
        images[~held_out],
        labels[~held_out],
        images[held_out],
        labels[held_out],
    )


def load_mnist(folder: Path) -> ImageData:
    """MNIST from its four standard idx files, gzipped or not.

    Raises:
        FileNotFoundError: naming the first file that is missing.
        ValueError: if a file is not what its name says.
    """
    parts = {key: _read_idx(folder, stem) for key, stem in _MNIST.items()}
    for kind in ("train", "test"):
        images, labels = parts[f"{kind}_images"], parts[f"{kind}_labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"{folder}: {kind} images {list(images.shape)} and labels {list(labels.shape)} "
                "do not fit together"
            )
    return ImageData(
        f"MNIST ({folder})",
        parts["train_images"].float().unsqueeze(1) / 255,
        parts["train_labels"].long(),
        parts["test_images"].float().unsqueeze(1) / 255,
        parts["test_labels"].long(),
    )


def _read_idx(folder: Path, stem: str) -> Tensor:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.exists():
            break
    else:
        raise FileNotFoundError(f"{folder} holds neither {stem}.gz nor {stem}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, dims = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{dims}I", raw, 4)
    except (EOFError, OSError, struct.error) as error:
        raise ValueError(f"{path} is not an idx file: {error}") from error
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if zero != 0 or kind != 0x08 or body.size != int(np.prod(shape)):
        raise ValueError(
            f"{path} is not an idx file of bytes: type {kind:#x}, shape {shape}, {body.size} bytes"
        )
    return torch.from_numpy(body.reshape(shape).copy())
