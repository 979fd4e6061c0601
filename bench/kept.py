"""Outcomes of a study's runs, kept in a file, so that an interrupted study goes on behind them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Kept:
    """What was run before.

    Args:
        path: the file; ``None`` keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: dict[str, Any] = {}
        if path is not None and path.exists():
            self.runs = json.loads(path.read_text())

    def once(self, key: str, run: Callable[[], Any]) -> Any:
        """The outcome of a run, from the file if it is there."""
        if key not in self.runs:
            self.runs[key] = run()
            print(key, json.dumps(self.runs[key]), flush=True)
            if self.path is not None:
                self.path.parent.mkdir(exist_ok=True)
                new = self.path.with_suffix(".new")
                new.write_text(json.dumps(self.runs, indent=1))
                new.rename(self.path)
        return self.runs[key]
