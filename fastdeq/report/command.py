"""The command ``fastdeq report``: a table of runs beside published metrics."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdeq.commands import Parser, UsageError, exit_status, typed
from fastdeq.report.notes import footnotes
from fastdeq.report.rows import make_rows
from fastdeq.report.runs import add_paths, find_runs
from fastdeq.report.tables import FORMATS

SUFFIXES = {".md": "markdown", ".csv": "csv", ".json": "json"}


@dataclass(frozen=True)
class Request:
    """The parsed command line. out: None prints the table."""

    paths: tuple[Path, ...]
    form: str
    out: Path | None


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 for an error in the runs, 2 for the usage."""
    return exit_status(lambda: _print_or_write(parse(arguments)), OSError, ValueError)


def _print_or_write(request: Request) -> int:
    table, notes = report(request)
    if request.out is None:
        print(table)
    else:
        request.out.write_text(table + "\n", encoding="utf-8", errors="backslashreplace")
        print(f"see {request.out}")
    for note in notes:
        print(note, file=sys.stderr)
    return 0


def parser() -> Parser:
    """The parser of `fastdeq report`."""
    command = typed("report")
    made = Parser(
        prog=command,
        description="Print a table of runs: one row per configuration, metrics as mean ± standard\n"
        "deviation over seeds, beside the published ones where there are any.",
        examples=f"  {command} outputs\n"
        f"  {command} outputs/multirun/2026-07-01_12-00-00-000000 --format csv\n"
        f"  {command} outputs --out table.md",
    )
    add_paths(made)
    made.add_argument(
        "--format",
        choices=list(FORMATS),
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)} (default: markdown)",
    )
    made.add_argument(
        "--out",
        metavar="FILE",
        help=f"write a file instead, in the format of its ending ({', '.join(SUFFIXES)})",
    )
    return made


def parse(arguments: Sequence[str]) -> Request:
    """Parse the arguments; raises UsageError."""
    given = parser().parse_args(arguments)
    form, out = _form(given.format, given.out)
    return Request(tuple(given.paths), form, out)


def report(request: Request) -> tuple[str, list[str]]:
    """The text of the table, and the notes that its format cannot hold.

    Raises: OSError or ValueError for paths without a finished run, and files that cannot be read.
    """
    found = find_runs(request.paths)
    if not found.runs:
        raise ValueError(
            f"{', '.join(map(str, request.paths))}: no finished run here or below, "
            f"{len(found.unfinished)} unfinished, {len(found.failed)} failed"
        )
    rows = make_rows(found.runs.values())
    table, notes = FORMATS[request.form](rows), footnotes(rows, found)
    if request.form == "markdown" and notes:
        return "\n".join([table, "", *(f"- {note}" for note in notes)]), []
    return table, notes


def _form(name: str | None, out: str | None) -> tuple[str, Path | None]:
    if out is None:
        return name or "markdown", None
    form = SUFFIXES.get(Path(out).suffix)
    if form is None:
        raise UsageError(f"--out is {out!r}, but must end in {', '.join(SUFFIXES)}")
    if name not in (None, form):
        raise UsageError(f"--format is {name}, but {out} is {form}: leave --format out")
    return form, Path(out)
