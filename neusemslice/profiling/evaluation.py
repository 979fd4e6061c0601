"""What the callbacks of training frameworks share: one profile per evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from neusemslice.graph import Inputs
from neusemslice.profiling.profile import METRICS, Profile
from neusemslice.profiling.profiler import Profiler


class _AbortedError(Exception):
    """Leaves a batch whose forward pass failed."""


class Evaluation:
    """Observes evaluations, one after the other, each with a profiler of its own.

    A batch is begun and ended by two calls, because frameworks call back before and after it.

    Args:
        who: the callback's name, for messages.

    Raises:
        ValueError: for a metric that is unknown or needs gradients.
    """

    def __init__(
        self,
        who: str,
        metrics: Sequence[str],
        num_classes: int | None,
        class_names: Sequence[str] | None,
        sites: Sequence[str] | None,
    ) -> None:
        possible = tuple(metric for metric in METRICS if metric not in ("taylor", "deeplift"))
        if not metrics or not set(metrics) <= set(possible):
            raise ValueError(
                f"{who}: metrics must be among {possible}, because an evaluation has no "
                f"gradients, got {tuple(metrics)}"
            )
        self.who = who
        self.profiler: Profiler | None = None
        self._metrics = metrics
        self._options: dict[str, Any] = {
            "num_classes": num_classes,
            "class_names": class_names,
            "sites": sites,
        }
        self._batch: AbstractContextManager[None] | None = None
        self._found: Profile | None = None

    @property
    def profile(self) -> Profile:
        """Of the last evaluation that was finished.

        Raises:
            RuntimeError: if there is none.
        """
        if self._found is None:
            raise RuntimeError(f"{self.who}: no evaluation has been observed yet")
        return self._found

    def start(self, model: nn.Module, inputs: Inputs) -> Profiler:
        """The profiler of a new evaluation."""
        self.drop()
        self.profiler = Profiler(model, inputs.head(2), self._metrics, **self._options)
        return self.profiler

    def begin(self, labels: Any, mask: Tensor | None) -> None:
        """Begins a batch."""
        assert self.profiler is not None
        batch = self.profiler.batch(labels, mask)
        batch.__enter__()
        self._batch = batch

    @property
    def in_batch(self) -> bool:
        """Whether a batch was begun and not ended."""
        return self._batch is not None

    def end(self) -> None:
        """Ends the batch."""
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.__exit__(None, None, None)

    def drop(self) -> None:
        """Forgets the evaluation, in or between batches; the model has no hooks of it then."""
        batch, self._batch = self._batch, None
        profiler, self.profiler = self.profiler, None
        if batch is not None:
            error = _AbortedError()
            batch.__exit__(_AbortedError, error, None)
        if profiler is not None:
            profiler.__exit__(_AbortedError, None, None)

    def finish(self) -> None:
        """Ends the evaluation and publishes its profile.

        Raises:
            RuntimeError: if nothing was observed.
            ValueError: if labels were out of range.
        """
        profiler = self.profiler
        self.drop()
        if profiler is None:
            raise RuntimeError(f"{self.who}: no batch with labels was observed in this evaluation")
        profiler.conclude()
        self._found = profiler.profile
