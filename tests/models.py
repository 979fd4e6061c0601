"""Small networks, one per way in which neurons hang together."""

import torch
import torch.nn.functional as F
from helpers import here
from torch import Tensor, nn


class Mlp(nn.Module):
    """Three linear layers with functional activations."""

    def __init__(self, inputs: int = 12, hidden: int = 16, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x.flatten(1))))))


def lenet() -> nn.Sequential:
    """Convolutions, then linear layers behind a flatten: a neuron is many features there."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )


class Residual(nn.Module):
    """A residual block with a projection, and one without."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(6, 8, 1, stride=2, bias=False)
        self.inner = nn.Conv2d(8, 10, 3, padding=1)
        self.outer = nn.Conv2d(10, 8, 3, padding=1)
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.project(x))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


class PaddedShortcut(nn.Module):
    """A shortcut that is padded with zero channels, as in the CIFAR ResNets of He et al."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + shortcut)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Concatenated(nn.Module):
    """Two convolutions read side by side, each with its own range of the reader's columns."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 4, 3, padding=1)
        self.right = nn.Conv2d(4, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(9)
        self.join = nn.Conv2d(9, 7, 1)
        self.head = nn.Linear(7, outputs)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.left(x))
        both = torch.cat([left, F.relu(self.right(left))], 1)
        return self.head(F.relu(self.join(self.norm(both))).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual: expand, depthwise, project."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.expand = nn.Conv2d(1, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.bn(self.expand(x)))))
        return self.head(F.relu(self.project(x)).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution and a norm over groups: neurons that cannot go one by one."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.third = nn.Conv2d(8, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.third(F.relu(self.grouped(F.relu(self.first(x))))))
        return self.head(self.norm(x).mean((2, 3)))


class Reused(nn.Module):
    """One layer that is called twice."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.twice = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1)))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return self.head(F.relu(self.last(x)))


IMAGES = {
    "lenet": lenet,
    "residual": Residual,
    "padded": PaddedShortcut,
    "concatenated": Concatenated,
    "depthwise": Depthwise,
    "grouped": Grouped,
}
"""Networks for images [N, 1, 8, 8] that give 4 logits."""


def settled(model: nn.Module, *shape: int, device: torch.device | str | None = None) -> nn.Module:
    """The model in evaluation mode, with running statistics and biases that are not trivial.

    They are the same on each device; it is on the one that the test runs on by default.
    """
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for _ in range(3):
            model(torch.randn(16, *shape))
    return here(model.eval()) if device is None else model.eval().to(device)


def images(samples: int, *shape: int, seed: int = 0) -> Tensor:
    """Random images; the same each time, whatever ran before."""
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed))


def loader(samples: int = 24, classes: int = 4, shape: tuple[int, ...] = (1, 8, 8)) -> list:
    """Batches of ragged sizes of random images whose class shows in their mean."""
    labels = torch.arange(samples) % classes
    x = images(samples, *shape) + labels.view(-1, *[1] * len(shape))
    return list(zip(x.split(7), labels.split(7), strict=True))


class Crossed(nn.Module):
    """Two plain layers behind a part in which neurons do not stay where they are.

    `kind` names the part: tokens and features are transposed, channels are shuffled, an image is
    flattened with its pixels first, or queries meet keys.
    """

    def __init__(self, kind: str, outputs: int = 4) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)
        width = 8 * 64 if kind == "pixels first" else 8
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.mixer = nn.Linear(64, 64)
        self.plain = nn.Linear(width, 12)
        self.head = nn.Linear(12, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if self.kind == "shuffle":
            x = x.view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)
        x = F.relu(self.second(x))
        if self.kind == "pixels first":
            x = x.permute(0, 2, 3, 1).flatten(1)
        elif self.kind == "transpose":
            tokens = x.flatten(2).transpose(1, 2)
            x = self.mixer(tokens.transpose(1, 2)).mean(2)
        elif self.kind == "attention":
            tokens = x.flatten(2).transpose(1, 2)
            scores = self.query(tokens) @ self.key(tokens).transpose(1, 2)
            x = (scores.softmax(-1) @ self.value(tokens)).mean(1)
        else:
            x = x.mean((2, 3))
        return self.head(F.relu(self.plain(x)))


class Tied(nn.Module):
    """Two layers with one weight, between others."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.last = nn.Linear(8, 6)
        self.head = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1)))
        x = F.relu(self.two(F.relu(self.one(x))))
        return self.head(F.relu(self.last(x)))


class Tokens(nn.Module):
    """Linear layers on tokens [N, T, 12] with a norm without affine between them."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.inner = nn.Linear(8, 16)
        self.outer = nn.Linear(16, 8)
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.outer(F.gelu(self.inner(self.norm(x))))
        return self.head(x.mean(1))


class Laid(nn.Module):
    """Tokens [N, T, 12] whose samples are laid end to end, `kind`, between two layers.

    "in order" keeps a sample's tokens together; "interleaved" puts the first tokens of all samples
    before the second ones; "constant" reads something that no sample is in.
    """

    def __init__(self, kind: str, outputs: int = 4) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(12, 8)
        self.second = nn.Linear(8, 6)
        self.place, self.size = nn.Linear(1, 5), nn.Linear(5, 6)
        self.head = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        x = F.relu(self.first(x))
        if self.kind == "interleaved":
            y = self.second(x.transpose(0, 1).flatten(0, 1)).view(t, n, 6).transpose(0, 1)
        else:
            y = self.second(x.flatten(0, 1)).view(n, t, 6)
        if self.kind == "constant":
            y = y * self.size(F.relu(self.place(torch.ones(7, 1))))[:1]
        return self.head(F.relu(y).mean(1))


class Pooled(nn.Module):
    """Tokens [N, T, 12] pooled by weights that one of their layers gives."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.weigh = nn.Linear(8, 1)
        self.inner = nn.Linear(8, 6)
        self.head = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = (self.weigh(x).softmax(1).transpose(1, 2) @ x).squeeze(1)
        return self.head(F.relu(self.inner(x)))
