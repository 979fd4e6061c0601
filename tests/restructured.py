"""Restructured networks of every kind, for the tests of what can be done with them."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformer_models
from helpers import current_device
from models import IMAGES, Mlp, Reused, Tied, loader, settled
from torch import nn

import neusemslice as nss
from neusemslice.graph import Inputs
from neusemslice.maintain import Restructured

TRANSFORMERS = ("vit", "bert", "gpt2", "llama", "mixtral")
NETWORKS = (*IMAGES, "mlp", "reused", "tied", *TRANSFORMERS)


@dataclass(frozen=True)
class Case:
    """A network, its restructured form, and a batch of inputs with labels."""

    model: nn.Module
    slicing: nss.SemanticSlicing
    small: Restructured
    batches: list[Any]
    inputs: Inputs


def build(name: str, seed: int = 1) -> nn.Module:
    """The whole network, as a user's own code would build it; another seed gives other values."""
    torch.manual_seed(seed)
    if name in IMAGES:
        return settled(IMAGES[name](), 1, 8, 8)
    if name in TRANSFORMERS:
        return transformer_models.transformer(name)
    return settled({"mlp": Mlp, "reused": Reused, "tied": Tied}[name](), 12)


def case(name: str, *, compensate: bool = True) -> Case:
    """The network at 60 % of each group's neurons; not to be changed.

    It and the inputs are on the device that the test runs on.
    """
    return _case(name, compensate, current_device())


@functools.cache
def _case(name: str, compensate: bool, device: torch.device) -> Case:
    model = build(name)
    if name in TRANSFORMERS:
        batches: list[Any] = transformer_models.batches(name, 8)
        inputs = Inputs((), transformer_models.batch(name, 4, seed=99))
    else:
        shape = (1, 8, 8) if name in IMAGES else (12,)
        batches = loader(96, shape=shape)
        inputs = Inputs((batches[0][0],))
    slicing = nss.slice(nss.profile(model, batches), threshold=0.9)
    small = nss.restructure(model, slicing, calibration=batches, keep=0.6, compensate=compensate)
    return Case(model, slicing, small, batches, inputs.to(device))
