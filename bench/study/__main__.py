"""Answers one question of the study.

python -m bench.study rq1            writes bench/results/study/rq1.{md,json,png}; hours
python -m bench.study rq1 --quick    scikit-learn's digits, two seeds, nothing written; seconds
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module

from rich.console import Console

from bench.study import readme
from bench.study.outcome import Outcome

QUESTIONS = ("rq1", "rq2", "rq3", "rq4")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.study", description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--quick", action="store_true", help="small data")
    parser.add_argument("--seeds", type=int, help="three, of a quick study two")
    given = parser.parse_args()
    seeds = given.seeds or (2 if given.quick else 3)
    # Not at the top: each needs other packages.
    run: Callable[[bool, int], Outcome] = import_module(f"bench.study.{given.question}").run
    found = run(given.quick, seeds)
    if not any(section.results for section in found.sections):
        raise SystemExit(f"bench.study {given.question}: the data is not here")
    console = Console(width=200)
    for section in found.sections:
        section.show(console)
    if not given.quick:
        print(f"wrote {found.write(given.question)}")
        if given.question == "rq4":
            readme.update()
    print(found.summary())


main()
