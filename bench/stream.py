"""Training batches of a fixed number, and images put aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.cifar import Images, prepared


class Stream:
    """A given number of batches in each pass, shuffled anew whenever images run out.

    Args:
        size: images of a batch.
        batches: of a pass.
        prepared: what the network takes, from pixels uint8 ``[N, C, H, W]``; may draw.
    """

    def __init__(
        self,
        images: Images,
        size: int,
        batches: int,
        seed: int,
        prepared: Callable[[Tensor, torch.Generator], Tensor] = prepared,
    ) -> None:
        self.images, self.size, self.batches, self.prepared = images, size, batches, prepared
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.zeros(0, dtype=torch.int64)
        for _ in range(self.batches):
            while len(order) < self.size:
                order = torch.cat(
                    [order, torch.randperm(len(self.images), generator=self.generator)]
                )
            chosen, order = self.images[order[: self.size]], order[self.size :]
            yield self.prepared(chosen.pixels, self.generator), chosen.labels


def random_parts(count: int, share: float) -> tuple[Tensor, Tensor]:
    """Which of so many images are in a random part of this share, and in the rest."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: round(share * count)], order[round(share * count) :]
