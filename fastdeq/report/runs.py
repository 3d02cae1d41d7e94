"""Finds run folders below paths, and in the job records of sweeps."""

from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdeq.runs.folder import OVERRIDES, is_empty_sweep, job_numbers
from fastdeq.runs.reading import Run, is_done, job_records, read_run


@dataclass(frozen=True)
class Found:
    """The runs below some paths.

    runs: finished runs in the order found. unfinished: folders of runs without a summary.
    failed: a sentence for each job of a sweep without a finished run, by its folder if it has one.
    empty: a sentence for each folder of a sweep of which no job has ended.
    """

    runs: dict[Path, Run] = field(default_factory=dict)
    unfinished: dict[Path, Path] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)
    empty: dict[Path, str] = field(default_factory=dict)


def find_runs(paths: Iterable[Path]) -> Found:
    """The runs of run folders, of folders above them, and of sweep folders; each once.

    Raises: OSError for a path that is not a folder, or without runs; ValueError for a file that
        cannot be read, with its name.
    """
    found = Found()
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such folder")
        if not path.is_dir():
            raise NotADirectoryError(f"{path} is a file: give a run's folder, or one above it")
        places = list(_search(path, set()))
        if not places:
            raise FileNotFoundError(
                f"{path}: no run folder here or below: give <paths.outputs>, or a folder in it"
            )
        for place in places:
            _add(place, found)
    return found


def add_paths(parser: ArgumentParser) -> None:
    """The argument of all subcommands of the report: what `find_runs` takes."""
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="a run folder, a folder above some, or the folder of a sweep",
    )


def _search(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Folders of runs and sweeps, but not below a run, where loggers keep files of equal names."""
    if folder.resolve() in seen:  # a link that leads back
        return
    seen.add(folder.resolve())
    if is_done(folder) or (folder / OVERRIDES).exists() or job_numbers(folder):
        yield folder
        return
    if is_empty_sweep(folder):
        yield folder
        return
    for inner in sorted(folder.iterdir()):
        if inner.is_dir():
            yield from _search(inner, seen)


def _add(folder: Path, found: Found) -> None:
    if is_empty_sweep(folder):
        found.empty[folder.resolve()] = (
            f"{folder} is a sweep of which no job has ended: give the folder of its runs, or wait"
        )
    elif job_numbers(folder):
        for number, record in job_records(folder):
            _add_job(folder, number, record, found)
    elif not is_done(folder):
        found.unfinished.setdefault(folder.resolve(), folder)
    elif folder.resolve() not in found.runs:
        found.runs[folder.resolve()] = read_run(folder)


def _add_job(sweep: Path, number: int, record: dict[str, Any], found: Found) -> None:
    folder = None if record["folder"] is None else Path(record["folder"])
    error = record["error"]
    if error is None and folder is not None and folder.is_dir():
        _add(folder, found)
        return
    settings = " ".join(f"{key}={value}" for key, value in record["overrides"].items())
    reason = error or f"its folder {folder} is not there: give the folder above its runs instead"
    what = "failed" if error else "is missing"
    key = sweep.resolve() / str(number) if folder is None else folder.resolve()
    found.failed[key] = f"job {number} of {sweep} {what} ({settings}): {reason}"
