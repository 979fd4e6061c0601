"""The command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """Find which neurons carry which classes, and maintain a trained network with it."""


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with MNIST's idx files; scikit-learn's digits by default."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for artefacts and figures.")
    ] = Path("run"),
) -> None:
    """Train, profile, slice, restructure, re-adapt and extend a small network on real digits."""
    from neusemslice import data as datasets
    from neusemslice.demo import run

    try:
        images = datasets.load_digits() if data is None else datasets.load_mnist(data)
    except (FileNotFoundError, ImportError, ValueError) as error:
        Console(stderr=True).print(f"[red]neusemslice demo:[/] {error}", highlight=False)
        raise typer.Exit(1) from error
    run(images, out)


def main() -> None:
    """Entry point of the ``neusemslice`` command."""
    app()


if __name__ == "__main__":
    main()
