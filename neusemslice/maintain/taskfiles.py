"""A task set as files, and one task as a model of its own.

``backbone.safetensors`` holds the shared model with the first task's head and norms, and one small
``task-NAME.safetensors`` per task what is its own: slice, head, norms. A further task rewrites the
backbone, whose free rows it trained, and adds a file; the files of earlier tasks stay as they are.
The backbone is written last and names the tasks with digests of what their files hold, so that
files of different sets are not mixed up.
"""

from __future__ import annotations

import copy
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neusemslice import _files
from neusemslice.graph import Graph, Inputs, device_of, fingerprint
from neusemslice.maintain.cutting import check_pruned, prune
from neusemslice.maintain.grow import put
from neusemslice.maintain.tasks import Task, TaskSet
from neusemslice.ops import bitset_pack, bitset_unpack
from neusemslice.slicing import Slice

_BACKBONE = "backbone.safetensors"


def save_tasks(tasks: TaskSet, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes a task set into a folder, each file atomically; gives the files."""
    folder = Path(folder)
    digests, paths = {}, []
    for name, task in tasks.tasks.items():
        tensors = {f"slice/{site}": bitset_pack(mask) for site, mask in task.slice.masks().items()}
        for part, module in tasks.parts(name).items():
            tensors |= {f"part/{part}/{key}": t for key, t in module.state_dict().items()}
        content = {
            "name": name,
            "classes": list(task.classes),
            "class_names": list(task.class_names),
            "rejects": task.rejects,
            "energy": task.energy,
            "parts": list(tasks.parts(name)),
        }
        paths.append(_files.write(_path(folder, name), "task", tensors, content))
        digests[name] = _digest(tensors)
    content = {"graph": tasks.graph.to_json(), "head": tasks.head, "tasks": list(digests.items())}
    state = tasks.backbone.state_dict()
    return [_files.write(folder / _BACKBONE, "backbone", state, content), *paths]


def load_tasks(folder: str | os.PathLike[str], model: nn.Module) -> TaskSet:
    """Reads what ``save_tasks`` wrote.

    Args:
        folder: with the files.
        model: of the backbone's structure before it was grown, with any weights; it is left as it
            was.

    Returns:
        The set on the model's device, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    folder = Path(folder)

    def build(
        tensors: dict[str, Tensor], content: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Graph, str, dict[str, str]]:
        graph = Graph.from_json(content["graph"])
        # Pairs, because a file's metadata keeps no order of names.
        return tensors, graph, str(content["head"]), dict(content["tasks"])

    state, graph, head, digests = _files.read(folder / _BACKBONE, "backbone", build)
    backbone = copy.deepcopy(model)
    try:
        _load(backbone, state)
        Slice.whole(graph).check_model(backbone)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{folder / _BACKBONE}: {error}") from error
    tasks: TaskSet | None = None
    for name, digest in digests.items():
        path = _path(folder, name)

        def build_task(
            tensors: dict[str, Tensor], content: dict[str, Any]
        ) -> tuple[Task, dict[str, dict[str, Tensor]], str]:
            masks = {
                s.name: bitset_unpack(tensors[f"slice/{s.name}"], s.neurons) for s in graph.sites
            }
            energy = content["energy"]
            task = Task(
                str(content["name"]),
                tuple(int(k) for k in content["classes"]),
                Slice(graph, masks),
                tuple(str(n) for n in content["class_names"]),
                bool(content["rejects"]),
                None if energy is None else (float(energy[0]), float(energy[1])),
            )
            parts = {
                str(part): {
                    key.removeprefix(f"part/{part}/"): tensor
                    for key, tensor in tensors.items()
                    if key.startswith(f"part/{part}/")
                }
                for part in content["parts"]
            }
            return task, parts, _digest(tensors)

        task, states, found = _files.read(path, "task", build_task)
        if found != digest:
            raise ValueError(f"{path} is not of the set that {folder / _BACKBONE} belongs to")
        parts = {}
        for part, own in states.items():
            parts[part] = copy.deepcopy(backbone.get_submodule(part))
            _load(parts[part], own)
        own_head = parts.pop(head, None)
        if tasks is None:
            tasks = TaskSet(backbone, head, (task,), {}, {})
        else:
            tasks.add(task, own_head, parts)
    if tasks is None:
        raise ValueError(f"{folder / _BACKBONE} names no task")
    return tasks.to(device_of(model)).eval()


def export_task(tasks: TaskSet, name: str, inputs: Inputs) -> nn.Module:
    """One task as a small model of its own, of plain modules.

    Neurons outside the task's slice are cut out. The model gives the task's logits within 1e-5 of
    their scale: other shapes are computed in another order.

    Args:
        inputs: samples to check that with.

    Raises:
        KeyError: naming the tasks that there are.
        RuntimeError: if the model does not answer as the task does.
    """
    tasks.task(name)
    task = tasks.tasks[name]
    with tasks.with_parts(name) as backbone:
        alone = copy.deepcopy(backbone).eval()
    if task.rejects:
        head: Any = alone.get_submodule(tasks.head)
        for own, tensor in list(head.named_parameters()):
            put(head, own, tensor.detach()[: len(task.classes)].clone())
    # The head may have another number of outputs than the backbone's, which the graph speaks of.
    graph = replace(tasks.graph, fingerprint=fingerprint(alone))
    kept = Slice(graph, task.slice.masks())
    small = prune(alone, kept)
    check_pruned(alone, small, kept, inputs)
    return small


def _path(folder: Path, name: str) -> Path:
    return folder / f"task-{name}.safetensors"


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name}:{tensor.dtype}{list(tensor.shape)};".encode())
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """``load_state_dict`` for layers that may have grown or have another number of outputs."""
    own = module.state_dict()
    for name, tensor in state.items():
        if name in own and own[name].dtype != tensor.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, the model's is {own[name].dtype}")
        if name in own and own[name].shape != tensor.shape and own[name].ndim == tensor.ndim:
            owner, _, last = name.rpartition(".")
            put(module.get_submodule(owner), last, tensor.to(own[name].device))
    module.load_state_dict(state)
