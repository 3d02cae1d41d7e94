"""The command ``fastdeq report html``: a page about runs, in one file."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fastdeq.commands import Parser, exit_status, typed
from fastdeq.report.html import page
from fastdeq.report.runs import add_paths
from fastdeq.runs.files import write_text


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 for an error in the runs, 2 for the usage."""
    return exit_status(lambda: _write(arguments), OSError, ValueError)


def _write(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)
    content, missing = page(given.paths, given.out)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(given.out, content)
    for note in missing:
        print(note, file=sys.stderr)
    print(f"see {given.out}")
    return 0


def parser() -> Parser:
    """The parser of `fastdeq report html`."""
    command = typed("report html")
    made = Parser(
        prog=command,
        description="Write a page about runs: the table of the report, to be sorted and filtered,\n"
        "plots, and the settings in which the runs differ. It is one file, which loads\n"
        "nothing from the network.",
        examples=f"  {command} outputs\n  {command} outputs/multirun/SWEEP --out sweep.html",
    )
    add_paths(made)
    made.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the file to write (default: report.html)",
    )
    return made
