"""Reading run folders: summary, configuration and overrides; and the job records of a sweep."""

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fastdeq.runs.folder import CONFIG, OVERRIDES, SUMMARY, job_numbers, job_record
from fastdeq.runs.identity import Leaf, current, identity_of, leaves

_LOADER = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # in C where PyYAML has it: ten times faster

FORMAT = 2
"""The format of summary.json. Format 1 (without the key `format`) has metrics under "figures"."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    summary: the content of summary.json. settings: the leaves of the resolved configuration, by
    their dotted keys. identity: the settings that the results depend on.
    """

    folder: Path
    summary: Mapping[str, Any]
    settings: Mapping[str, Leaf]
    identity: Mapping[str, Leaf]

    @property
    def choices(self) -> Mapping[str, str]:
        """The choices of the configuration's groups."""
        chosen: Mapping[str, str] = self.summary["choices"]
        return chosen

    @property
    def seed(self) -> int:
        return int(self.summary["seed"])

    @property
    def only_tested(self) -> bool:
        """Whether it trained nothing (mode=test)."""
        return self.summary.get("mode") == "test"

    @property
    def reference(self) -> Mapping[str, Any] | None:
        """The published row to compare the run with, if there is one with metrics."""
        reference: Mapping[str, Any] | None = self.summary.get("reference")
        return reference if reference and reference.get("metrics") else None

    @property
    def device(self) -> str:
        """The name and number of its devices: of a GPU, or cpu."""
        count = self.summary.get("devices", 1)
        return f"{self.summary.get('device', 'unknown')}{f' × {count}' if count > 1 else ''}"

    @cached_property
    def metrics(self) -> dict[str, float]:
        """All metrics of the last epoch and of the test, and the minutes of training."""
        metrics = {name: float(value) for name, value in self.summary["metrics"].items()}
        if (seconds := self.summary.get("train_seconds")) is not None:
            metrics["training_minutes"] = seconds / 60
        return metrics

    @property
    def diverged(self) -> bool:
        """Whether a metric is not finite."""
        return not all(math.isfinite(value) for value in self.metrics.values())


def read_run(folder: Path) -> Run:
    """The run of a folder.

    Raises: FileNotFoundError if the configuration is missing; ValueError for a file that cannot be
        read, with its name.
    """
    summary = read_summary(folder)
    _check(folder / SUMMARY, summary, _SUMMARY)
    if not {"model", "solver"} <= set(summary["choices"]):
        raise ValueError(f"{folder / SUMMARY} names no model and solver: {_FOREIGN}")
    settings = leaves(current(read_config(folder)))
    return Run(folder=folder, summary=summary, settings=settings, identity=identity_of(settings))


def is_done(folder: Path) -> bool:
    """Whether the run has finished."""
    return (folder / SUMMARY).exists()


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary, converted to format 2.

    Raises: OSError if there is none; ValueError for a file that cannot be read.
    """
    path = folder / SUMMARY
    summary = _read(path)
    found = summary.get("format", 1)
    if found not in (1, FORMAT):
        raise ValueError(f"{path} has format {found}: it was written by another fastdeq, use that")
    if found == 1:
        summary = with_metrics(summary)
        if isinstance(score := summary.get("score"), dict):
            summary["score"] = with_metrics(score)
        if isinstance(reference := summary.get("reference"), dict):
            summary["reference"] = with_metrics(reference)
    _check(path, summary, {"metrics": dict})
    return summary


def with_metrics(node: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a summary, with keys of format 1 replaced by those of format 2."""
    names = {"figures": "metrics", "figure": "metric"}
    return {names.get(key, key): value for key, value in node.items()}


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """The resolved configuration, in the file `name`.

    Raises: FileNotFoundError if there is none; ValueError for a file that cannot be read.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a run is identified by its configuration")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(_damaged(path, error)) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no keys: {_FOREIGN}")
    return config


def read_overrides(folder: Path) -> list[str]:
    """The overrides of the command that made the run.

    Raises: FileNotFoundError for a folder without them; ValueError for a file that is damaged.
    """
    path = folder / OVERRIDES
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a run folder ({OVERRIDES} is missing): give the folder that a run "
            "has printed"
        )
    try:
        overrides: list[str] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(_damaged(path, error)) from error
    return overrides


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, each with the numbers that it has; empty if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: value for name, text in row.items() if (value := _number(text)) is not None}
            for row in csv.DictReader(file)
            if row.get("epoch")
        ]


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):  # an empty cell, or one that is being written
        return None


def job_records(sweep: Path) -> list[tuple[int, dict[str, Any]]]:
    """Number and record (overrides, folder, error) of a sweep's jobs, in their order.

    Raises: ValueError for one that cannot be read.
    """
    records = []
    for number in job_numbers(sweep):
        path = job_record(sweep, number)
        records.append((number, _read(path)))
        _check(path, records[-1][1], _JOB)
    return records


_SUMMARY = {"metrics": dict, "choices": dict} | dict.fromkeys(
    ("seed", "steps", "epochs", "parameters"), int
)
_JOB = {"overrides": dict, "folder": str | None, "error": str | None}
_FOREIGN = "it was not written by a run of fastdeq"


def _read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it is not a dictionary."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(_damaged(path, error)) from error
    return content if isinstance(content, dict) else {}


def _check(path: Path, content: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """Raises: ValueError if keys are missing or their values have other types."""
    for key, kind in needed.items():
        if key not in content or not isinstance(content[key], kind):
            raise ValueError(f"{path} holds no {key!r}, or not as expected: {_FOREIGN}")


def _damaged(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{path} cannot be read, it is truncated or damaged: leave its folder out ({reason})"
