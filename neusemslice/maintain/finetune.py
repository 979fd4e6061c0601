"""Fine-tuning: all of a model is trained, alone or after a teacher.

The teacher's loss is that of knowledge distillation (Hinton, Vinyals and Dean, 2015): with logits
``z`` of the model, ``t`` of the teacher and a temperature T,

    (1 - SOFT) · cross-entropy(z, label)  +  SOFT · T² · KL(softmax(t / T) ‖ softmax(z / T))

where T² keeps the gradients of the second term at the size that they have at T = 1. A restructured
model's natural teacher is the whole model that it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neusemslice.graph import Inputs, evaluation, logits_of
from neusemslice.maintain.training import Training, fit, summed_cross_entropy

SOFT = 0.9
"""Weight of the teacher's answers against that of the labels."""


def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
) -> Training:
    """Trains all parameters of a model, in place, with AdamW.

    Running statistics of batch norms move along. The learning rate falls linearly to 0; weights
    decay, biases and norms (whatever has one dimension) do not. Parameters that do not require
    gradients stay as they are.

    Args:
        model: changed; modes and ``requires_grad`` flags are as before afterwards.
        loader: labelled batches; samples labelled -100 are left out.
        epochs: passes over the loader.
        lr: learning rate at the beginning.
        teacher: a model with the same outputs on the same device, whose answers are learned too.
        temperature: softens both answers in that.

    Raises:
        ValueError: if ``epochs``, ``lr`` or ``temperature`` is not positive, no parameter requires
            gradients, the teacher answers in another shape, a label is none of the model's, or the
            loss or a weight does not stay finite.
    """
    for name, value in (("lr", lr), ("temperature", temperature)):
        if not value > 0:
            raise ValueError(f"finetune: {name} must be positive, got {value}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("finetune: no parameter of the model requires gradients")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    options: dict[str, Any] = {"what": "finetune", "freeze_statistics": False}
    if teacher is None:
        return fit(model, loader, optimizer, epochs, **options)

    def distillation(inputs: Inputs, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = logits_of(inputs.run(teacher))
        if wanted.shape != logits.shape:
            raise ValueError(
                f"finetune: the teacher must answer in the model's shape {list(logits.shape)}, "
                f"got {list(wanted.shape)}"
            )
        hard = summed_cross_entropy(logits, labels, None, "finetune")
        known = labels != -100
        own, wanted = (F.log_softmax(z[known] / temperature, -1) for z in (logits, wanted))
        soft = F.kl_div(own, wanted, reduction="sum", log_target=True)
        return (1 - SOFT) * hard + SOFT * temperature**2 * soft

    with evaluation(teacher):
        return fit(model, loader, optimizer, epochs, loss=distillation, **options)
