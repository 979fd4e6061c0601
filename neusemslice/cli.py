"""The command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from torch import nn

    from neusemslice.maintain import Restructured
    from neusemslice.report import ClassAccuracy
    from neusemslice.slicing import SemanticSlicing
    from neusemslice.task import Task

app = typer.Typer(add_completion=False, no_args_is_help=True)

_PROFILE, _SLICE = "profile.safetensors", "slice.safetensors"
_MODEL, _DELTA, _UNDO = "model.safetensors", "delta.safetensors", "undo.safetensors"
_TASKS = "tasks"

_Run = Annotated[Path, typer.Argument(help="Folder that an earlier command wrote into.")]
_Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for what is written.")]


@app.callback()
def _commands() -> None:
    """Find which neurons carry which classes, and maintain a trained network with it."""


@contextmanager
def _one_sentence(command: str) -> Iterator[None]:
    """Says what is wrong with the user's input in one sentence, without a traceback."""
    try:
        yield
    except (FileNotFoundError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        Console(stderr=True).print(f"[red]neusemslice {command}:[/] {error}", highlight=False)
        raise typer.Exit(1) from error


@contextmanager
def _ranks() -> Iterator[tuple[int, int]]:
    """This process's rank and their number; joins the others if torchrun started several."""
    import torch
    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with MNIST's idx files; scikit-learn's digits by default."),
    ] = None,
    out: _Out = Path("run"),
) -> None:
    """Train, profile, slice, restructure, re-adapt and extend a small network on real digits."""
    from neusemslice import data as datasets
    from neusemslice.demo import run

    with _one_sentence("demo"):
        images = datasets.load_digits() if data is None else datasets.load_mnist(data)
    run(images, out)


@app.command()
def profile(
    task: Annotated[Path, typer.Argument(help="Python file with model() and train().")],
    out: _Out = Path("run"),
    metric: Annotated[
        list[str] | None,
        typer.Option(help="avg, var, taylor or deeplift; may be given several times."),
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="What deeplift compares with: zeros, or the mean of the inputs.")
    ] = "zeros",
) -> None:
    """Observe every layer and class of a model in one sweep; continues where it was interrupted.

    Started by torchrun, each process takes its share of the batches, and all are merged.
    """
    from neusemslice.profiling import profile as sweep
    from neusemslice.report import print_profile
    from neusemslice.task import Task, remember, shard

    with _one_sentence("profile"), _ranks() as (rank, world):
        given = Task(task)
        loader = given.train()
        found = sweep(
            given.model(),
            loader if world == 1 else shard(loader, rank, world),
            metric or ("avg", "taylor"),
            class_names=given.optional("class_names"),
            loss=given.optional("loss"),
            labels=given.optional("labels"),
            baseline=baseline,
            checkpoint=out / f"checkpoint-{rank}-of-{world}.safetensors",
        )
        if world > 1:
            found.all_reduce()
        if rank == 0:
            remember(task, out)
            print_profile(found, found.save(out / _PROFILE), Console())


@app.command("slice")
def slice_(
    run: _Run = Path("run"),
    metric: Annotated[
        str, typer.Option(help="How contribution is scored: a metric of the profile, or ens.")
    ] = "taylor",
    threshold: Annotated[
        float, typer.Option(help="Share of a class's contribution that its neurons must reach.")
    ] = 0.95,
) -> None:
    """Find critical neurons and semantic components in a profile."""
    from neusemslice.profiling import Profile
    from neusemslice.report import print_slicing
    from neusemslice.slicing import slice_profile

    with _one_sentence("slice"):
        slicing = slice_profile(Profile.load(run / _PROFILE), metric, threshold)
        print_slicing(slicing, slicing.save(run / _SLICE), Console())


@app.command()
def restructure(
    run: _Run = Path("run"),
    macs: Annotated[
        float | None, typer.Option(help="Share of the multiply-adds to keep at most.")
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Share of the parameters to keep at most.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of each group's neurons to keep.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Share of a forward pass's time to keep at most.")
    ] = None,
    round_to: Annotated[
        int | None,
        typer.Option(
            help="With a target, each group keeps a multiple of this, or all; by default what is "
            "fast if the target is about speed."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show what each layer would keep, and cut nothing; train() is needed for a target "
            "with compensation only.",
        ),
    ] = False,
    compensate: Annotated[
        bool, typer.Option(help="Fit what is left to what the whole model answers.")
    ] = True,
    samples: Annotated[
        int, typer.Option(help="Of train(), from the beginning, that this is done on.")
    ] = 2048,
) -> None:
    """Make the model physically smaller; without a target it keeps its critical neurons.

    Accuracy is shown if the task has a test().
    """
    from neusemslice.maintain import Undo, plan
    from neusemslice.maintain import restructure as cut_down
    from neusemslice.report import plan_table, print_restructured
    from neusemslice.slicing import SemanticSlicing
    from neusemslice.task import beginning, remembered

    with _one_sentence("restructure"):
        given = remembered(run)
        slicing = SemanticSlicing.load(run / _SLICE)
        model = given.model()
        if dry_run:
            if latency is not None:
                raise ValueError("a latency is measured on what was cut, so it has no dry run")
            needs_data = compensate and {macs, params, keep} != {None}
            planned = plan(
                model,
                slicing,
                calibration=beginning(given.train(), samples) if needs_data else None,
                macs=macs,
                params=params,
                keep=keep,
                round_to=round_to,
            )
            Console().print(plan_table(planned))
            return
        result = cut_down(
            model,
            slicing,
            calibration=beginning(given.train(), samples),
            macs=macs,
            params=params,
            keep=keep,
            latency=latency,
            round_to=round_to,
            compensate=compensate,
        )
        paths = [
            result.save(run / _MODEL),
            Undo.between(model, result.model, result.kept).save(run / _UNDO),
        ]
        print_restructured(
            result, slicing, paths, Console(), _accuracy(given, slicing, model, result)
        )


@app.command()
def report(run: _Run = Path("run")) -> None:
    """Show again what restructuring did; accuracy, if the task has a test(), is measured anew."""
    from neusemslice.maintain import Restructured
    from neusemslice.report import print_restructured
    from neusemslice.slicing import SemanticSlicing
    from neusemslice.task import remembered

    with _one_sentence("report"):
        given = remembered(run)
        slicing = SemanticSlicing.load(run / _SLICE)
        model = given.model()
        result = Restructured.load(run / _MODEL, model)
        print_restructured(result, slicing, [], Console(), _accuracy(given, slicing, model, result))


def _accuracy(
    given: Task, slicing: SemanticSlicing, model: nn.Module, result: Restructured
) -> ClassAccuracy | None:
    """How the whole and the smaller model answer the task's test samples, if it has any."""
    from neusemslice.report import class_accuracy

    if not callable(test := given.optional("test")):
        return None
    names, labels = slicing.profile.class_names, given.optional("labels")
    return class_accuracy(model, result.model, test(), names, labels)


@app.command()
def readapt(
    run: _Run = Path("run"),
    budget: Annotated[
        float, typer.Option(help="Share of the model's neurons that may be tuned.")
    ] = 0.2,
    epochs: Annotated[int, typer.Option(help="Passes over the new samples at most.")] = 5,
    lr: Annotated[float, typer.Option(help="Learning rate at the beginning.")] = 3e-3,
    replay: Annotated[
        bool, typer.Option("--replay", help="Mix the batches with batches of train().")
    ] = False,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Let batch norms follow the new samples.")
    ] = False,
) -> None:
    """Fit the samples of the task's new() by tuning a share of the neurons.

    Continues where it was interrupted.
    """
    from neusemslice import _files
    from neusemslice.graph import fingerprint
    from neusemslice.maintain import readapt as fitted_to
    from neusemslice.report import print_readapted
    from neusemslice.slicing import SemanticSlicing
    from neusemslice.task import remembered

    with _one_sentence("readapt"):
        given = remembered(run)
        if given.optional("loss"):
            raise ValueError(
                f"{given.path} has a loss(); readapt trains with the cross-entropy of the labels"
            )
        slicing = SemanticSlicing.load(run / _SLICE)
        result = fitted_to(
            given.model(),
            slicing,
            given.new(),
            budget,
            old=given.train(),
            replay=replay,
            recalibrate=recalibrate,
            epochs=epochs,
            lr=lr,
            labels=given.optional("labels"),
            checkpoint=run / "readapt-checkpoint.safetensors",
        )
        content = {
            "fingerprint": fingerprint(result.model),
            "class_names": list(slicing.profile.class_names),
        }
        paths = [
            _files.write(run / _MODEL, "model", result.model.state_dict(), content),
            result.delta.save(run / _DELTA),
        ]
        print_readapted(result, paths, Console())


@app.command()
def extend(
    run: _Run = Path("run"),
    name: Annotated[str, typer.Option(help="Of the new task.")] = "new",
    capacity: Annotated[
        float | None,
        typer.Option(help="Share of the neurons to free the first time; 0.5 if not given."),
    ] = None,
    reserve: Annotated[
        float, typer.Option(help="Share of the free neurons to leave to later tasks.")
    ] = 0.0,
    replay: Annotated[
        float, typer.Option(help="Share of train() to tell the new classes' samples from.")
    ] = 0.0,
    grow: Annotated[
        float, typer.Option(help="Neurons to add to each layer, as a share of its own.")
    ] = 0.0,
    epochs: Annotated[int, typer.Option(help="Passes over the new samples.")] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate at the beginning.")] = 3e-3,
) -> None:
    """Learn the classes of the task's new() with neurons that no class before needs.

    Repeated with other new classes and another name it adds a further task.
    """
    from neusemslice.maintain import capacity_left, load_tasks, save_tasks, task_accuracies
    from neusemslice.maintain import extend as extended_by
    from neusemslice.maintain.holdout import Labelled
    from neusemslice.report import print_extended
    from neusemslice.slicing import SemanticSlicing
    from neusemslice.task import remembered

    with _one_sentence("extend"):
        given = remembered(run)
        if given.optional("loss"):
            raise ValueError(
                f"{given.path} has a loss(); extend trains with the cross-entropy of the labels"
            )
        slicing = SemanticSlicing.load(run / _SLICE)
        old, new = given.train(), given.new()
        if labels := given.optional("labels"):
            old, new = Labelled(old, labels, "extend"), Labelled(new, labels, "extend")
        model: Any = given.model()
        if known := (run / _TASKS).exists():
            model = load_tasks(run / _TASKS, model)
        elif capacity is None:
            capacity = 0.5
        # A model that has grown since is another one than the slicing's.
        grew = known and model.graph.fingerprint != slicing.profile.graph.fingerprint
        room = None if grew else capacity_left(model, slicing, new, capacity)
        result = extended_by(
            model,
            None if known else slicing,
            new,
            name=name,
            old=old,
            replay=replay,
            capacity=capacity,
            reserve=reserve,
            grow=grow,
            epochs=epochs,
            lr=lr,
        )
        first = next(iter(result.model.tasks))
        accuracies = task_accuracies(result.model, {first: old, name: new})
        paths = save_tasks(result.model, run / _TASKS)
        print_extended(result, accuracies, room, paths, Console())


def main() -> None:
    """Entry point of the ``neusemslice`` command."""
    app()


if __name__ == "__main__":
    main()
