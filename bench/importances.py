"""How torch-pruning ranks the inner channels of a residual network's blocks.

All importances of ``torch_pruning.pruner.importance``, as its own pruners call them with equal
shares per layer: a block's group is the rows of its first convolution, their batch norm, and the
columns of its second. Gradients are of the mean cross-entropy of the calibration images with their
labels; squared ones (Hessian) of each image alone. The library's own accumulation keeps the last
image's only, so that ours is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import importance as found

from bench.cifar import Images, ResNet

IMPORTANCES: dict[str, Callable[[], found.Importance]] = {
    "L1, group": lambda: found.GroupMagnitudeImportance(p=1),
    "L2, group": lambda: found.GroupMagnitudeImportance(p=2),
    "L1, filter": lambda: found.GroupMagnitudeImportance(p=1, group_reduction="first"),
    "L2, filter": lambda: found.GroupMagnitudeImportance(p=2, group_reduction="first"),
    "BN scale": found.BNScaleImportance,
    "LAMP": found.LAMPImportance,
    "FPGM": found.FPGMImportance,
    "Taylor": found.GroupTaylorImportance,
    "Taylor, multivariable": lambda: found.GroupTaylorImportance(multivariable=True),
    "Hessian": found.GroupHessianImportance,
    "OBD-C": lambda: found.OBDCImportance(num_classes=10),
    "activation": found.ActivationImportance,
    "random": found.RandomImportance,
}


def inner_layers(model: nn.Module) -> list[str]:
    """The first convolution of each block."""
    return [name for name, _ in model.named_modules() if name.endswith(".conv1")]


def ranking(model: ResNet, name: str, images: Images) -> dict[str, list[int]]:
    """Per block its inner channels, the most important first; the model is left as it was."""
    own = copy.deepcopy(model).eval()
    importance = IMPORTANCES[name]()
    _prepare(own, importance, images)
    dependencies = tp.DependencyGraph().build_dependency(own, images[:2].inputs())
    torch.manual_seed(0)  # for the random one
    order = {}
    for layer in inner_layers(own):
        module = own.get_submodule(layer)
        every = list(range(module.out_channels))
        group = dependencies.get_pruning_group(module, tp.prune_conv_out_channels, every)
        order[layer] = importance(group).sort(descending=True, stable=True).indices.tolist()
    return order


def _prepare(model: ResNet, importance: found.Importance, images: Images) -> None:
    """Gives the model and the importance what the latter looks at."""
    if isinstance(importance, found.ActivationImportance):
        with importance.compute_importance(model), torch.no_grad():
            model(images.inputs())
    elif isinstance(importance, found.GroupHessianImportance):
        squares = [torch.zeros_like(p) for p in model.parameters()]
        for x, y in images.batches(1):
            gradients = torch.autograd.grad(_loss(model, x, y), list(model.parameters()))
            for total, gradient in zip(squares, gradients, strict=True):
                total.addcmul_(gradient, gradient)
        for parameter, total in zip(model.parameters(), squares, strict=True):
            parameter.grad = total / len(images)
    elif isinstance(importance, found.OBDCImportance):
        _curvature(model, importance, images)
        _gradients(model, images)
    elif isinstance(importance, found.GroupTaylorImportance):
        _gradients(model, images)


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _gradients(model: nn.Module, images: Images) -> None:
    model.zero_grad()
    for x, y in images.batches():
        (_loss(model, x, y) * len(y) / len(images)).backward()


def _curvature(model: nn.Module, importance: found.OBDCImportance, images: Images) -> None:
    """The Fisher matrix's diagonal, with labels drawn from the model's own answers."""
    generator = torch.Generator().manual_seed(0)
    handles = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            importance.modules.append(module)
            handles.append(module.register_forward_pre_hook(importance._save_input))
            handles.append(module.register_full_backward_hook(importance._save_grad_output))
    for x, _ in images.batches(50):
        drawn = torch.multinomial(model(x).detach().softmax(1), 1, generator=generator)[:, 0]
        _loss(model, x.requires_grad_(), drawn).backward()
        importance.step()
    for handle in handles:
        handle.remove()
