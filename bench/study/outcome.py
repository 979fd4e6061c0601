"""What a question's study gives: tables, of which every row tells its seeds, and a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import report
from bench.report import Column, Section, Target

SPREAD = (
    Column("seeds", "seeds", "number", in_summary=True),
    Column("mean", "mean", "number", in_summary=True),
    Column("std", "± std", "number", in_summary=True),
)
"""Columns that every table of the study begins with."""

FOLDER = "study"


@dataclass
class Outcome:
    """Tables of one question.

    Attributes:
        question: for the page's heading.
        sections: every row has the columns of ``SPREAD``.
        draw: writes the figure to a path.
    """

    question: str
    sections: list[Section]
    draw: Callable[[Path], None]

    def write(self, name: str) -> Path:
        """The page, beside it the JSON and the figure."""
        processor = report.processor()
        target = Target(
            f"{FOLDER}/{name}",
            self.question,
            f"Made by `python -m bench.study {name}` on {processor}.\n\n"
            f"![{self.question}]({name}.png)",
            Target.this_machine().compiler,
            {"processor": processor, "threads": torch.get_num_threads()},
        )
        for section in self.sections:
            page = section.write(target)
        self.draw(page.with_suffix(".png"))
        return page

    def summary(self) -> str:
        """The last line: by row the values of ``SPREAD``."""
        keys = [column.key for column in SPREAD]
        results = [result for section in self.sections for result in section.results]
        return json.dumps(
            {
                result.name: {
                    key: None if result.values[key] is None else round(result.values[key], 3)
                    for key in keys
                }
                for result in results
            }
        )


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """What a row says of a value for each seed; of one seed there is no deviation."""
    return {
        "seeds": len(values),
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }
