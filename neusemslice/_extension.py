"""Loads the compiled extension, and says what is wrong when that fails."""

from __future__ import annotations

import importlib
import json
import platform
from pathlib import Path
from types import ModuleType

import torch


def _explain(error: ImportError) -> str:
    folder = Path(__file__).parent
    found = f"torch {torch.__version__}, Python {platform.python_version()}"
    description = folder / "_C_build.json"
    built = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if not built:
        return (
            f"neusemslice: no compiled extension lies in {folder} (found: {found}). "
            "Build it with `make build`, or `pip install --no-build-isolation .`"
        )
    made_for = "an unknown torch and Python"
    if description.exists():
        build = json.loads(description.read_text())
        made_for = f"torch {build['torch']}, Python {build['python']}"
    return (
        f"neusemslice: the compiled extension {', '.join(built)} was built for {made_for}, "
        f"but was found with {found}, and does not load ({error}). "
        "Build it again with `make build`, or `pip install --no-build-isolation .`"
    )


def load() -> ModuleType:
    """Imports ``neusemslice._C``, which registers the operators.

    Raises:
        ImportError: naming what the extension was built for and what was found.
    """
    try:
        return importlib.import_module("neusemslice._C")
    except ImportError as error:
        raise ImportError(_explain(error)) from error
