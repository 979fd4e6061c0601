"""The Gram matrix of features about their mean (contract: ``csrc/ops/gram.h``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neusemslice.ops._fake import check_one_device, register_fake


@dataclass
class Gram:
    """The state of ``gram_``: what is known of ``F`` features from all rows so far.

    Attributes:
        count: float64 ``[]``, number of rows.
        mean: float64 ``[F]``.
        products: float64 ``[F, F]``, sum over the rows of ``(x_i - mean_i) (x_j - mean_j)``;
            divided by ``count`` it is the covariance.
    """

    count: Tensor
    mean: Tensor
    products: Tensor

    @classmethod
    def empty(cls, features: int, device: torch.device | str | None = None) -> Gram:
        """The state of no rows.

        Raises:
            ValueError: for a negative number of features.
        """
        if features < 0:
            raise ValueError(f"Gram: features must be at least 0, got {features}")
        return cls(
            *(
                torch.zeros(shape, dtype=torch.float64, device=device)
                for shape in ((), (features,), (features, features))
            )
        )


def gram_(state: Gram, x: Tensor) -> None:
    """Adds rows to the Gram matrix of their features, in place.

    Rows are taken relative to their mean, so features far from zero lose no digits. Products are
    sums of at most 512 terms in float32 (float64 for float64 rows), added up in float64. The
    result is exactly symmetric and has the same bits each time and, on the CPU, at any number of
    threads. No gradient flows through it.

    Args:
        state: of ``F`` features, on the device of ``x``; changed.
        x: ``[N, F]``, float64, float32, float16 or bfloat16, any strides. NaN and infinity spread
            to all that has to do with the features that have them.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device. Nothing has changed then.
    """
    torch.ops.neusemslice.gram_(state.count, state.mean, state.products, x)


@register_fake("gram_")
def _gram_fake(count: Tensor, mean: Tensor, products: Tensor, x: Tensor) -> None:
    check_one_device("gram_", count, mean, products, x)
    for changed in (count, mean, products):
        torch.autograd.graph.increment_version(changed)
