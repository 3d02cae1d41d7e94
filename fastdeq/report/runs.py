"""Run folders: found below paths and through the records of sweeps, and read."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fastdeq.runs.identity import Leaf, identity, leaves

SUMMARY, CONFIG, OVERRIDES = "summary.json", "config.yaml", "overrides.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    summary: what it has written about itself. settings: its resolved configuration, as the leaves
    of the tree by their dotted keys. identity: those that its results depend on.
    """

    folder: Path
    summary: Mapping[str, Any]
    settings: Mapping[str, Leaf]
    identity: Mapping[str, Leaf]

    @property
    def choices(self) -> Mapping[str, str]:
        """Of the configuration's groups."""
        chosen: Mapping[str, str] = self.summary["choices"]
        return chosen

    @property
    def seed(self) -> int:
        return int(self.summary["seed"])

    @property
    def reference(self) -> Mapping[str, Any] | None:
        """The published row that the run stands beside, if there is one with figures."""
        reference: Mapping[str, Any] | None = self.summary.get("reference")
        return reference if reference and reference.get("figures") else None

    @property
    def device(self) -> str:
        """What it ran on: the name of a GPU, or cpu, and how many."""
        count = self.summary.get("devices", 1)
        return f"{self.summary.get('device', 'unknown')}{f' × {count}' if count > 1 else ''}"

    @cached_property
    def figures(self) -> dict[str, float]:
        """All of the last epoch and of the test, and the minutes of training."""
        figures = {name: float(value) for name, value in self.summary["figures"].items()}
        if (seconds := self.summary.get("train_seconds")) is not None:
            figures["training_minutes"] = seconds / 60
        return figures

    @property
    def diverged(self) -> bool:
        """Whether a figure is not finite."""
        return not all(math.isfinite(value) for value in self.figures.values())


@dataclass(frozen=True)
class Found:
    """What paths lead to: finished runs in the order found, and what else there is to tell.

    unfinished: folders of runs without a summary. failed: a sentence for each job of a sweep that
    left no run, by its folder, if it came to have one.
    """

    runs: dict[Path, Run] = field(default_factory=dict)
    unfinished: dict[Path, Path] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)


def find_runs(paths: Iterable[Path]) -> Found:
    """The runs of run folders, of folders above them, and of the folders of sweeps; each once.

    Raises: OSError for a path that is no folder, or that leads to no run; ValueError for a file
    that cannot be read, with its name.
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


def job_records(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Number and record (overrides, folder, error) of a sweep's jobs, in their order.

    Raises: ValueError for one that cannot be read.
    """
    files = sorted(folder.glob("jobs/*.json"), key=lambda path: int(path.stem))
    return [(int(path.stem), _read(path, _JOB)) for path in files]


def _search(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Folders of runs and sweeps; none below a run, where loggers keep files of the same names."""
    if folder.resolve() in seen:  # a link that leads back
        return
    seen.add(folder.resolve())
    if (folder / SUMMARY).exists() or (folder / OVERRIDES).exists() or _is_sweep(folder):
        yield folder
        return
    for inner in sorted(folder.iterdir()):
        if inner.is_dir():
            yield from _search(inner, seen)


def _is_sweep(folder: Path) -> bool:
    return any(path.stem.isdecimal() for path in folder.glob("jobs/*.json"))


def _add(folder: Path, found: Found) -> None:
    if _is_sweep(folder):
        for number, record in job_records(folder):
            _add_job(folder, number, record, found)
    elif not (folder / SUMMARY).exists():
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


def read_run(folder: Path) -> Run:
    """The run of a folder.

    Raises: FileNotFoundError for one that lacks its configuration; ValueError for a file that
    cannot be read, with its name.
    """
    summary = _read(folder / SUMMARY, _SUMMARY)
    if not {"model", "solver"} <= set(summary["choices"]):
        raise ValueError(f"{folder / SUMMARY} names no model and solver: {_FOREIGN}")
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a run is told apart by its configuration")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(_damaged(path, error)) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no keys: {_FOREIGN}")
    return Run(folder=folder, summary=summary, settings=leaves(config), identity=identity(config))


_SUMMARY = {"figures": dict, "choices": dict} | dict.fromkeys(
    ("seed", "steps", "epochs", "parameters"), int
)
_JOB = {"overrides": dict, "folder": str | None, "error": str | None}
_FOREIGN = "it was not written by a run of fastdeq"


def _read(path: Path, needed: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON file that holds a dictionary with these keys and types."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(_damaged(path, error)) from error
    record: dict[str, Any] = content if isinstance(content, dict) else {}
    for key, kind in needed.items():
        if key not in record or not isinstance(record[key], kind):
            raise ValueError(f"{path} holds no {key!r}, or not as expected: {_FOREIGN}")
    return record


def _damaged(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{path} cannot be read, it is truncated or damaged: leave its folder out ({reason})"
