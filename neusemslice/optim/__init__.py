"""Optimizers that tune chosen rows of parameters and leave every other bit as it was."""

from neusemslice.optim.adamw import MaskedAdamW
from neusemslice.optim.rows import RowGradients, TunedParameter, row_gradients
from neusemslice.optim.sgd import MaskedSGD

__all__ = ["MaskedAdamW", "MaskedSGD", "RowGradients", "TunedParameter", "row_gradients"]
