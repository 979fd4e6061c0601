"""Observation of what a Lightning trainer validates and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from neusemslice.profiling.batching import LabelsOf, take_apart
from neusemslice.profiling.evaluation import Evaluation
from neusemslice.profiling.profile import Profile

try:
    from lightning.pytorch import Callback
except ImportError:  # the same package under its older name
    from pytorch_lightning import Callback


class LightningProfiler(Callback):  # type: ignore[misc]  # one of two, so of no known type
    """Makes a profile of each validation or test of a Lightning trainer.

        observer = nss.profiling.LightningProfiler()
        trainer = Trainer(callbacks=[observer])
        trainer.validate(module, loader)
        profile = observer.profile

    It observes ``validate()``, ``test()`` and the validations within ``fit()`` but for the sanity
    check. Batches and labels have the forms that ``nss.profile`` takes. Among several processes
    each has a profile of its share; ``profile.all_reduce()`` merges them.

    Args:
        metrics: among "avg" and "var".
        model: the part of the Lightning module to observe; called with a batch's inputs it must
            return logits. By default the Lightning module itself.
        num_classes, class_names, sites: as for ``nss.Profiler``.
        labels: for batches of another form; takes a batch and returns its labels.

    Raises:
        ValueError: for another metric.
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("avg",),
        *,
        model: nn.Module | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        sites: Sequence[str] | None = None,
        labels: LabelsOf | None = None,
    ) -> None:
        self._evaluation = Evaluation(type(self).__name__, metrics, num_classes, class_names, sites)
        self._model = model
        self._labels = labels

    @property
    def profile(self) -> Profile:
        """Of the last validation or test that was finished.

        Raises:
            RuntimeError: if there is none.
        """
        return self._evaluation.profile

    def on_validation_batch_start(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking:
            return
        where = f"{self._evaluation.who}: batch {batch_idx}"
        inputs, labels = take_apart(batch, where, self._labels)
        if self._evaluation.profiler is None:
            model = pl_module if self._model is None else self._model
            # For the whole evaluation, so that a compiled model is compiled once.
            self._evaluation.start(model, inputs).__enter__()
        self._evaluation.begin(labels, inputs.kwargs.get("attention_mask"))

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluation.end()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._evaluation.finish()

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._evaluation.drop()
