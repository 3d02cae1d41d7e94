"""The command ``fastdeq report plots``: plots of runs as PNG and PDF."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fastdeq.commands import Parser, exit_status, typed
from fastdeq.report.plots import PLOTS, draw, write
from fastdeq.report.records import read_records
from fastdeq.report.runs import add_paths


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 for an error in the runs, 2 for the usage."""
    return exit_status(lambda: _draw_all(arguments), OSError, ValueError)


def _draw_all(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)
    runs, notes = read_records(given.paths)
    plots = {name: plot for name in PLOTS if (plot := draw(name, runs)) is not None}
    for note in notes:
        print(note, file=sys.stderr)
    if not plots:
        raise ValueError("these runs have nothing to draw yet: wait for the end of an epoch")
    given.out.mkdir(parents=True, exist_ok=True)
    for name, plot in plots.items():
        print(*write(plot, given.out, name))
    return 0


def parser() -> Parser:
    """The parser of `fastdeq report plots`."""
    command = typed("report plots")
    made = Parser(
        prog=command,
        description="Draw runs beside each other: training curves, NFE, residuals of the solves,\n"
        "spectral radius, shares of time, and accuracy against budget (mode=curve).\n"
        "What a run has not recorded is left out.",
        examples=f"  {command} RUN\n  {command} outputs/multirun/SWEEP --out plots/sweep",
    )
    add_paths(made)
    made.add_argument(
        "--out",
        type=Path,
        default=Path("plots"),
        metavar="FOLDER",
        help="where <plot>.png and <plot>.pdf are written (default: plots)",
    )
    return made
