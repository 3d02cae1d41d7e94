"""The command ``fastdeq report``: a table of runs beside published metrics."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdeq.commands import Parser, UsageError, exit_status, typed
from fastdeq.report.notes import footnotes, nothing
from fastdeq.report.rows import make_rows
from fastdeq.report.runs import add_paths, find_runs
from fastdeq.report.selection import Condition, condition, matching, names
from fastdeq.report.tables import COLUMNS, FORMATS, cells, markdown, ordered
from fastdeq.report.terminal import listed, shown
from fastdeq.streams import terminal_width

SUFFIXES = {".md": "markdown", ".csv": "csv", ".json": "json"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The parsed command line.

    form: None: markdown, or a table for the terminal. out: None prints the table. columns: names;
    empty: those that are filled. sort: names of columns. where: conditions on the runs.
    """

    paths: tuple[Path, ...]
    form: str | None
    out: Path | None
    columns: tuple[str, ...] = ()
    sort: tuple[str, ...] = ()
    where: tuple[Condition, ...] = ()


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 for an error in the runs, 2 for the usage."""
    return exit_status(lambda: _print_or_write(parse(arguments)), OSError, ValueError)


def _print_or_write(request: Request) -> int:
    width = terminal_width() if request.form is None and request.out is None else None
    table, notes = report(request, width)
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
        f"  {command} outputs --columns=model,accuracy,nfe --sort=-accuracy --where=data=digits\n"
        f"  {command} outputs --out table.md",
    )
    add_paths(made)
    made.add_argument(
        "--format",
        choices=list(FORMATS),
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)} (default: markdown; on a terminal a table that fits it)",
    )
    made.add_argument(
        "--out",
        metavar="FILE",
        help=f"write a file instead, in the format of its ending ({', '.join(SUFFIXES)})",
    )
    made.add_argument(
        "--columns",
        type=names,
        default=(),
        metavar="NAMES",
        help=f"{', '.join(COLUMNS)}, or metrics of summary.json (default: those that are filled)",
    )
    made.add_argument(
        "--sort",
        type=names,
        default=(),
        metavar="NAMES",
        help="columns to sort by; --sort=-accuracy: the largest first",
    )
    made.add_argument(
        "--where",
        type=condition,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this choice or setting: model=deq,skip_deq, solver.tol=1e-3; several "
        "may be given",
    )
    return made


def parse(arguments: Sequence[str]) -> Request:
    """Parse the arguments; raises UsageError."""
    given = parser().parse_args(arguments)
    form, out = _form(given.format, given.out)
    if given.columns and form not in (None, "markdown"):
        raise UsageError(f"--columns chooses those of the table, and {form} has all: leave it out")
    return Request(
        paths=tuple(given.paths),
        form=form,
        out=out,
        columns=given.columns,
        sort=given.sort,
        where=tuple(given.where),
    )


def report(request: Request, width: int | None = None) -> tuple[str, list[str]]:
    """The text of the table, and the notes that its format cannot hold.

    width: of a terminal, for a table that fits it.

    Raises: OSError or ValueError for paths without a finished run, files that cannot be read, and
        names that no column or setting has.
    """
    found = find_runs(request.paths)
    rows = ordered(make_rows(matching(found.runs.values(), request.where)), request.sort)
    if not rows:
        raise ValueError(nothing(request.paths, found))
    notes = footnotes(rows, found)
    if width is not None:
        table, missing = shown(cells(rows, request.columns), width)
        if missing:
            notes.append(f"left out for the width: {', '.join(missing)} (--columns chooses)")
        return "\n".join([table, "", listed(notes, width)] if notes else [table]), []
    if request.form in (None, "markdown"):
        table = markdown(rows, request.columns)
        return "\n".join([table, "", *(f"- {note}" for note in notes)] if notes else [table]), []
    return FORMATS[request.form](rows), notes


def _form(name: str | None, out: str | None) -> tuple[str | None, Path | None]:
    if out is None:
        return name, None
    form = SUFFIXES.get(Path(out).suffix)
    if form is None:
        raise UsageError(f"--out is {out!r}, but must end in {', '.join(SUFFIXES)}")
    if name not in (None, form):
        raise UsageError(f"--format is {name}, but {out} is {form}: leave --format out")
    return form, Path(out)
