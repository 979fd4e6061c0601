"""The table that the README shows, made from what RQ4 found."""

from __future__ import annotations

import json
from pathlib import Path

from bench.report import RESULTS

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- made by bench/study/readme.py -->\n", "<!-- end -->\n"
PROBLEM = "cifar-2: "


def table() -> str:
    """Of five classes of CIFAR-10 after five others: a row for each method."""
    section = json.loads((RESULTS / "study" / "rq4.json").read_text())["sections"]["rq4"]
    headings = ("old classes %", "new classes %", "mean %", "old answers unchanged %")
    lines = [f"| CIFAR-10, ResNet-20 | {' | '.join(headings)} |", "|---" + "|--:" * 4 + "|"]
    for result in section["results"]:
        if not result["name"].startswith(PROBLEM):
            continue
        values = result["values"]
        cells = [
            f"{values[key]:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
            for key, name in (("old", "old_std"), ("new", "new_std"), ("mean", "std"))
            for deviation in (values[name],)
        ]
        cells.append(f"{values['unchanged']:.0f}")
        lines.append(f"| {result['name'].removeprefix(PROBLEM)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def update() -> None:
    """Puts the table into the README, between its marks."""
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
