"""The command ``python -m fastdeq.report``: a table of runs beside published results."""

import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdeq.report.notes import footnotes
from fastdeq.report.rows import make_rows
from fastdeq.report.runs import find_runs
from fastdeq.report.tables import FORMATS

KEYS = ("format", "out")
SUFFIXES = {".md": "markdown", ".csv": "csv", ".json": "json"}


class UsageError(Exception):
    """A command line that cannot be understood; its text is one line."""


@dataclass(frozen=True)
class Request:
    """What a command line asks for; out: None prints."""

    paths: tuple[Path, ...]
    form: str
    out: Path | None


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 for an error in the runs, 2 for the usage."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage())
        return 0 if arguments else 2
    try:
        request = parse(arguments)
        table, notes = report(request)
        if request.out is None:
            print(table)
        else:
            request.out.write_text(table + "\n", encoding="utf-8", errors="backslashreplace")
            print(f"see {request.out}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note in notes:
        print(note, file=sys.stderr)
    return 0


def usage() -> str:
    """Return what the command says when it is asked for help."""
    return (
        "usage: python -m fastdeq.report PATH ... [key=value ...]\n\n"
        "Prints a table of runs: one row per configuration, metrics as mean ± deviation over\n"
        "seeds, with the published ones beside them where the experiment has them.\n"
        "PATH: a run's folder, a folder above some, or that of a sweep (outputs/multirun/...).\n"
        f"Keys: format={'|'.join(FORMATS)} of what is printed, markdown if not given;\n"
        f"out=FILE to write instead, in the format of its ending ({', '.join(SUFFIXES)})."
    )


def parse(arguments: Sequence[str]) -> Request:
    """Return what is asked for; raises UsageError."""
    paths: list[Path] = []
    settings: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if Path(argument).exists() or (not equals and key not in KEYS and key[:1] != "-"):
            paths.append(Path(argument))
        elif key not in KEYS:
            raise UsageError(_unknown("key", key, KEYS))
        elif not text:
            raise UsageError(f"{key} has no value: write {key}=VALUE")
        else:
            settings[key] = text
    if not paths:
        raise UsageError("no PATH: name a run's folder, or one above some, such as outputs")
    form, out = _form(settings.get("format"), settings.get("out"))
    return Request(tuple(paths), form, out)


def report(request: Request) -> tuple[str, list[str]]:
    """The text that is asked for, and the notes that it has no place for.

    Raises: OSError or ValueError for paths that lead to no finished run, and files that cannot be
    read.
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
    if name is not None and name not in FORMATS:
        raise UsageError(_unknown("format", name, FORMATS))
    if out is None:
        return name or "markdown", None
    form = SUFFIXES.get(Path(out).suffix)
    if form is None:
        raise UsageError(f"out is {out!r}, but must end in {', '.join(SUFFIXES)}")
    if name not in (None, form):
        raise UsageError(f"format={name}, but out={out} is {form}: leave the format to the ending")
    return form, Path(out)


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    cure = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(known)}"
    return f"unknown {what} {name!r}: {cure}"
