"""What of a long study was already measured.

Every finished run is kept in ``bench/results/runs``, by all that it depends on but the code: an
interrupted study goes on behind it, and a table's figures can be traced to single runs. Where code
changes what runs give, these have to be deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUNS = Path(__file__).parent / "results" / "runs"


class Runs:
    """Makes the runs that are not kept yet, and keeps what they gave.

    Args:
        kept: the file, JSON; ``None`` keeps nothing.
    """

    def __init__(self, kept: Path | None) -> None:
        self.kept = kept
        self.runs: dict[str, Any] = {}
        if kept is not None and kept.exists():
            self.runs = json.loads(kept.read_text())

    def once(self, key: str, run: Callable[[], Any]) -> Any:
        """The outcome of a run, from the file if it is there."""
        if key not in self.runs:
            self.runs[key] = run()
            print(key, json.dumps(self.runs[key])[:160], flush=True)
            if self.kept is not None:
                self.kept.parent.mkdir(parents=True, exist_ok=True)
                new = self.kept.with_suffix(".new")
                new.write_text(json.dumps(self.runs, indent=1))
                new.rename(self.kept)
        return self.runs[key]
