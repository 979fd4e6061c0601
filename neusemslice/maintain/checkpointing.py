"""A training run that keeps its best state, stops early, and continues after an interrupt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neusemslice import _files
from neusemslice.maintain.training import Position, Score, Watcher

SECONDS = 30.0
"""Time between two checkpoints of a run."""


@dataclass
class Checkpoint:
    """A file of tensors and JSON, and what is to be found in it.

    Attributes:
        path: where it is; ``None`` writes nothing.
        subject: what a run must have in common with the one that wrote it.
    """

    path: Path | None
    subject: Mapping[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)

    def read(self, what: str) -> bool:
        """Fills it from its file; whether there was one.

        Raises:
            ValueError: if the file is damaged or of another run, saying in what that differs.
        """
        if self.path is None or not self.path.exists():
            return False
        tensors, subject, content = _files.read(
            self.path,
            "training",
            lambda tensors, content: (tensors, dict(content["subject"]), dict(content["run"])),
        )
        for name, mine in self.subject.items():
            if (theirs := subject.get(name)) != mine:
                raise ValueError(
                    f"{what}: {self.path} is the checkpoint of another run, with {name} = "
                    f"{theirs} instead of {mine}"
                )
        self.tensors, self.content = tensors, content
        return True

    def write(self) -> None:
        """Writes it atomically."""
        if self.path is not None:
            content = {"subject": dict(self.subject), "run": self.content}
            _files.write(self.path, "training", self.tensors, content)

    def remove(self) -> None:
        """Removes the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix/``, without it."""
        return {
            name.removeprefix(f"{prefix}/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}/")
        }

    def put(self, prefix: str, part: Mapping[str, Tensor]) -> None:
        """Replaces the tensors under ``prefix/``."""
        rest = {n: t for n, t in self.tensors.items() if not n.startswith(f"{prefix}/")}
        self.tensors = rest | {f"{prefix}/{name}": tensor.clone() for name, tensor in part.items()}


class RandomState:
    """The random numbers that loaders and layers will get: torch's own, and loaders' generators."""

    def __init__(self, loaders: Sequence[Iterable[Any] | None], device: torch.device) -> None:
        self._device = device
        self._generators = {}
        for number, loader in enumerate(loaders):
            for owner in (loader, getattr(loader, "sampler", None)):
                generator = getattr(owner, "generator", None)
                if isinstance(generator, torch.Generator):
                    self._generators[f"loader {number}"] = generator

    def get(self) -> dict[str, Tensor]:
        """The states at present."""
        found = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(self._device)
        return found | {name: g.get_state() for name, g in self._generators.items()}

    def set(self, states: Mapping[str, Tensor]) -> None:
        """Goes back to states that ``get`` gave."""
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self._device)
        for name, generator in self._generators.items():
            generator.set_state(states[name])


class Keeper(Watcher):
    """Keeps the best state of what is trained, and a checkpoint of the run.

    The best state is that of the highest validation accuracy, of equal ones that of the lowest
    loss; the state before the first step is one of them. Without validation it is the last.

    Args:
        parameters: what is trained, and buffers that move meanwhile.
        optimizer: of the former.
        random: of the run.
        validate: scores the model as it stands.
        patience: epochs in a row without a better state after which the run ends.
        checkpoint: already read, with a random state under "now"; the run begins there.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        random: RandomState,
        validate: Callable[[], Score] | None,
        patience: int,
        checkpoint: Checkpoint,
    ) -> None:
        super().__init__()
        self._parameters = parameters
        self._optimizer = optimizer
        self._random = random
        self._validate = validate
        self._patience = patience
        self._checkpoint = checkpoint
        self._last_saved = time.monotonic()
        self._begin: dict[str, Tensor] = {}
        self._resumes = "position" in checkpoint.content
        self.scores: list[Score] = []
        self.best_epoch = 0
        self._best: list[Tensor] = []
        if self._resumes:
            self._load()
            return
        random.set(checkpoint.part("now"))
        if validate is not None:
            self.scores = [validate()]
            self._best = [parameter.detach().clone() for parameter in parameters]

    @property
    def best(self) -> Score | None:
        """The score of the best state."""
        return self.scores[self.best_epoch] if self.scores else None

    def epoch_begins(self) -> None:
        if self._resumes:
            self._random.set(self._checkpoint.part("epoch"))
            self._resumes = self.at.batches > 0
        self._begin = self._random.get()

    def passed_over(self) -> None:
        self._random.set(self._checkpoint.part("now"))
        self._resumes = False

    def stepped(self) -> None:
        if time.monotonic() - self._last_saved >= SECONDS:
            self.save()

    def epoch_ended(self) -> bool:
        if self._validate is not None:
            self.scores.append(self._validate())
            if _rank(self.scores[-1]) > _rank(self.scores[self.best_epoch]):
                self.best_epoch = len(self.scores) - 1
                self._best = [parameter.detach().clone() for parameter in self._parameters]
            if len(self.scores) - 1 - self.best_epoch >= self._patience:
                return False
        self._begin = self._random.get()
        if time.monotonic() - self._last_saved >= SECONDS:
            self.save()
        return True

    @torch.no_grad()
    def restore_best(self) -> None:
        """Gives the parameters the best state."""
        for parameter, value in zip(self._parameters, self._best, strict=False):
            parameter.copy_(value)

    def save(self) -> None:
        """Writes the checkpoint."""
        if self._checkpoint.path is None:
            return
        named = {f"{i}": p.detach() for i, p in enumerate(self._parameters)}
        self._checkpoint.put("parameters", named)
        self._checkpoint.put("best", {f"{i}": value for i, value in enumerate(self._best)})
        self._checkpoint.put("optimizer", _flat(self._optimizer.state_dict()["state"]))
        self._checkpoint.put("epoch", self._begin)
        self._checkpoint.put("now", self._random.get())
        self._checkpoint.put("position", {"summed": self.at.summed})
        self._checkpoint.content |= {
            "position": {
                "batches": self.at.batches,
                "steps": self.at.steps,
                "seconds": self.at.seconds,
                "losses": self.at.losses,
            },
            "scores": [asdict(found) for found in self.scores],
            "best_epoch": self.best_epoch,
        }
        self._checkpoint.write()
        self._last_saved = time.monotonic()

    @torch.no_grad()
    def _load(self) -> None:
        saved = self._checkpoint
        for i, parameter in enumerate(self._parameters):
            parameter.copy_(saved.part("parameters")[f"{i}"])
        self._best = [
            saved.part("best")[f"{i}"].to(parameter.device)
            for i, parameter in enumerate(self._parameters)
            if saved.content["scores"]
        ]
        state = self._optimizer.state_dict()
        state["state"] = _nested(saved.part("optimizer"))
        self._optimizer.load_state_dict(state)
        self.at = Position(summed=saved.tensors["position/summed"], **saved.content["position"])
        self.scores = [Score(**found) for found in saved.content["scores"]]
        self.best_epoch = int(saved.content["best_epoch"])


def _rank(found: Score) -> tuple[float, float]:
    return found.accuracy, -found.loss


def _flat(state: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{i}/{name}": t for i, entry in state.items() for name, t in entry.items()}


def _nested(flat: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = tensor
    return state
