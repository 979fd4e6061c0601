"""Observation of what a ``transformers.Trainer`` evaluates.

The trainer tells its callbacks when an evaluation is over but not when it begins, and shows them no
batch. So two hooks on the model itself, one before and one after its forward pass, begin and end
the batches; the sites' hooks come and go with each of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neusemslice.graph import Inputs, is_compiled
from neusemslice.profiling.batching import LabelsOf, label_key
from neusemslice.profiling.evaluation import Evaluation
from neusemslice.profiling.profile import Profile


class TrainerProfiler(TrainerCallback):
    """Makes a profile of each evaluation of a ``transformers.Trainer``.

        observer = nss.profiling.TrainerProfiler()
        trainer = Trainer(model, arguments, eval_dataset=data, callbacks=[observer])
        trainer.evaluate()
        profile = observer.profile

    It observes ``evaluate()``, the evaluations within ``train()``, and ``predict()`` where the data
    are labelled. Labels and "attention_mask" are those that the model is called with. Among several
    processes each has a profile of its share; ``profile.all_reduce()`` merges them.

    The model carries two hooks, which do nothing in training, until ``close()`` is called or the
    callback is collected. They refer to this model only: copies of it are not observed.

    Args:
        metrics: among "avg" and "var".
        num_classes, class_names, sites: as for ``nss.Profiler``.
        labels: where the model is not called with "labels" or "label": takes the keyword arguments
            of the call and returns the labels, or None for a call to pass over.

    Raises:
        ValueError: for another metric; when the trainer is made, if the model is compiled.
        RuntimeError: after an evaluation in which the model was not called with labels.
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("avg",),
        *,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        sites: Sequence[str] | None = None,
        labels: LabelsOf | None = None,
    ) -> None:
        self._evaluation = Evaluation(type(self).__name__, metrics, num_classes, class_names, sites)
        self._labels = labels
        self._close: Callable[[], object] = _nothing
        self._model: Callable[[], nn.Module | None] = _nothing
        self._starting = False
        # Whether the trainer has said that the last forward pass was a step of its evaluation.
        self._confirmed = True
        self._loader: object = None

    @property
    def profile(self) -> Profile:
        """Of the last evaluation that was finished, among them those within training.

        Raises:
            RuntimeError: if there is none.
        """
        return self._evaluation.profile

    def close(self) -> None:
        """Takes the hooks off the model."""
        self._evaluation.drop()
        self._close()

    # The trainer's events.

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._attach(args, kwargs["model"])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._attach(args, kwargs["model"])

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._confirmed = True
        loader = kwargs.get("eval_dataloader")
        if self._loader is not None and loader is not self._loader:
            self._forget()
            raise RuntimeError(
                f"{self._evaluation.who}: the evaluation before this one did not finish, and the "
                "samples of the two cannot be told apart any more; evaluate again"
            )
        if self._evaluation.profiler is not None:
            self._loader = loader

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._loader = None
        self._evaluation.finish()

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        self._loader = None
        if self._evaluation.profiler is not None:
            self._evaluation.finish()

    # The model's forward passes.

    def _attach(self, args: TrainingArguments, model: nn.Module) -> None:
        if args.torch_compile or is_compiled(model):
            raise ValueError(
                f"{self._evaluation.who}: the model must not be compiled, because its graph would "
                "break at every batch; use nss.Profiler in a loop of your own"
            )
        self._forget()
        if self._model() is model:
            return
        self.close()
        self._model = weakref.ref(model)
        this = weakref.ref(self)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observer = this()
            if observer is not None and module is observer._model():
                observer._before(module, args, kwargs)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            observer = this()
            if observer is not None and module is observer._model():
                observer._after(failed=output is None)

        handles = (
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        )
        self._close = weakref.finalize(self, _remove, handles)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._starting or model.training:
            return
        key = label_key(kwargs)
        raw = kwargs.get(str(key)) if self._labels is None else self._labels(kwargs)
        if raw is None:
            return
        if self._evaluation.in_batch or (not self._confirmed and self._loader is None):
            self._forget()  # left by an interrupt, or by a call that was none of the trainer's
        if not self._confirmed:
            self._forget()
            raise RuntimeError(
                f"{self._evaluation.who}: the model was called with labels more than once in one "
                "step of the evaluation, and each call would count its samples"
            )
        inputs = Inputs(args, {name: value for name, value in kwargs.items() if name != key})
        if self._evaluation.profiler is None:
            self._starting = True  # the model is run to trace it
            try:
                self._evaluation.start(model, inputs)
            finally:
                self._starting = False
        self._evaluation.begin(raw, kwargs.get("attention_mask"))
        self._confirmed = False

    def _after(self, failed: bool) -> None:
        if self._starting:
            return
        if failed:
            self._forget()
        else:
            self._evaluation.end()

    def _forget(self) -> None:
        self._evaluation.drop()
        self._loader = None
        self._confirmed = True


def _nothing() -> None:
    return None


def _remove(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
