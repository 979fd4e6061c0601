"""The command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, no_args_is_help=True)

_PROFILE, _SLICE = "profile.safetensors", "slice.safetensors"

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
    from neusemslice.task import Task, shard

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


def main() -> None:
    """Entry point of the ``neusemslice`` command."""
    app()


if __name__ == "__main__":
    main()
