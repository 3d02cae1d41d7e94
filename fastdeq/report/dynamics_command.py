"""The command ``fastdeq report dynamics``: how solvers move a scalar state, as GIF and PNG."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fastdeq.commands import Parser, exit_status, typed
from fastdeq.report.configuration import MODELS
from fastdeq.report.dynamics import MOST, dynamics_of, still, write_animation
from fastdeq.report.plots import style
from fastdeq.report.records import read_records
from fastdeq.report.runs import add_paths


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 for an error in the runs, 2 for the usage."""
    return exit_status(lambda: _draw(arguments), OSError, ValueError)


def _draw(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)
    runs, notes = read_records(given.paths)
    for note in notes:
        print(note, file=sys.stderr)
    if len(runs) > MOST:
        raise ValueError(f"{len(runs)} runs are found, but the picture has {MOST} panels at most")
    order = list(MODELS)
    panels = sorted(
        (dynamics_of(run) for run in runs),
        key=lambda panel: order.index(panel.title) if panel.title in order else len(order),
    )
    given.out.mkdir(parents=True, exist_ok=True)
    image, animation = given.out / "dynamics.png", given.out / "dynamics.gif"
    with style():
        still(panels).savefig(image)
    write_animation(panels, animation)
    print(image, animation)
    return 0


def parser() -> Parser:
    """The parser of `fastdeq report dynamics`."""
    command = typed("report dynamics")
    made = Parser(
        prog=command,
        description="Draw how the solver moves the state from z_k to z_{k+1}, beside the target,\n"
        "one panel per run: as a GIF, one frame per step, and as a PNG with all steps.\n"
        "The runs are those of experiment=dynamics (sweep=dynamics trains all three).",
        examples=f"  {command} RUN RUN RUN\n  {command} outputs/multirun/SWEEP --out plots",
    )
    add_paths(made)
    made.add_argument(
        "--out",
        type=Path,
        default=Path("plots"),
        metavar="FOLDER",
        help="where dynamics.gif and dynamics.png are written (default: plots)",
    )
    return made
