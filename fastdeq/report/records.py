"""What the plots read of run folders, of finished runs and of those that are still training."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastdeq.report.notes import different_data
from fastdeq.report.runs import Found, find_runs
from fastdeq.runs.folder import METRICS, RECORDED, curve_file, recording_file
from fastdeq.runs.identity import identity, without_seeds
from fastdeq.runs.reading import is_done, read_config, read_metrics, read_summary
from fastdeq.runs.recorded import RecordedSolves, read_recording

MOST = 12
"""Runs in a plot at most."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run for the plots. rows: of metrics.csv. summary: empty while the run is not finished.

    recording: of the test, or else of the newest epoch. curve: of mode=curve.
    """

    folder: Path
    label: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    recording: RecordedSolves | None = None
    curve: Mapping[str, Any] | None = None

    def with_shares(self, shares: Mapping[str, float] | None) -> "Record":
        """This run with shares of time that are not in its folder yet."""
        return replace(self, summary={**self.summary, "train_time_shares": shares})

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """A metric over the epochs, counted from 1."""
        points = [(row["epoch"] + 1, row[name]) for row in self.rows if name in row]
        return [x for x, _ in points], [y for _, y in points]

    @property
    def score(self) -> str:
        """The metric that the model is judged by: accuracy, or loss of a regression."""
        return "accuracy" if any("val/accuracy" in row for row in self.rows) else "loss"


def read_records(paths: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """The runs below some paths, and one line for everything that is missing or not comparable.

    Raises: OSError or ValueError for paths without runs.
    """
    return read_found(find_runs(paths), paths)


def read_found(found: Found, paths: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """As `read_records`, of runs that are found already below `paths`."""
    folders = [run.folder for run in found.runs.values()]
    folders += [folder for key, folder in found.unfinished.items() if key not in found.failed]
    notes = [*found.failed.values()]
    records = []
    for folder in folders[:MOST]:
        record, missing = read_record(folder)
        records.append(record)
        notes += missing
    if len(folders) > MOST:
        left = len(folders) - MOST
        notes.append(f"{left} of {len(folders)} runs are left out of the plots: {MOST} at most")
    if not records:
        raise ValueError(_nothing(paths, found))
    return _labelled(records), [
        *notes,
        *different_data([identity(each.config) for each in records]),
    ]


def read_record(folder: Path) -> tuple[Record, list[str]]:
    """A run, and one line for each file that is missing or cannot be read."""
    notes = []
    if not is_done(folder):
        notes.append(f"{folder} is unfinished: what it has written so far is drawn")
    rows = read_metrics(folder / METRICS)
    if not rows:
        notes.append(f"{folder} has no metrics yet: {METRICS} is missing or empty")
    recording, curve = None, None
    try:
        recording = _recording(folder)
        curve = _curve(folder)
    except ValueError as error:
        notes.append(str(error))
    config = read_config(folder)
    name = str(config.get("name", folder.name)).rpartition("/")[2]
    record = Record(
        folder=folder,
        label=f"{name} s{config.get('seed', 0)}",
        config=config,
        rows=rows,
        summary=read_summary(folder) if is_done(folder) else {},
        recording=recording,
        curve=curve,
    )
    return record, notes


def _recording(folder: Path) -> RecordedSolves | None:
    tested = recording_file(folder, None)
    epochs = sorted((folder / RECORDED).glob("epoch_*.h5"))
    newest = [tested] if tested.is_file() else epochs[-1:]
    return read_recording(newest[0]) if newest else None


def _curve(folder: Path) -> dict[str, Any] | None:
    path = next(iter(sorted(folder.glob(curve_file(Path("*")).name), reverse=True)), None)
    if path is None:
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"metric", "points"} <= content.keys():
            raise ValueError("keys are missing")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): make it again by mode=curve") from error
    return content


def _labelled(records: list[Record]) -> list[Record]:
    """Records with different labels: those that are equal get the settings in which they differ, or
    else the name of the folder.
    """
    settings = _settings(records)
    for texts in (settings, [record.folder.name for record in records]):
        counts = Counter(record.label for record in records)
        records = [
            replace(record, label=f"{record.label} {text}")
            if counts[record.label] > 1 and text
            else record
            for record, text in zip(records, texts, strict=True)
        ]
    return records


def _settings(records: Sequence[Record]) -> list[str]:
    """The settings in which a run differs from others of its name; empty if more than two do."""
    known = [without_seeds(identity(record.config)) for record in records]
    texts = []
    for mine, record in zip(known, records, strict=True):
        name = record.config.get("name")
        alike = [
            each
            for each, other in zip(known, records, strict=True)
            if other.config.get("name") == name
        ]
        varied = [
            key
            for key in sorted({key for each in alike for key in each})
            if len({each.get(key) for each in alike}) > 1 and key.split(".")[0] not in _FOLLOWING
        ]
        few = varied if len(varied) <= 2 else []
        texts.append(" ".join(f"{key}={mine[key]}" for key in few if key in mine))
    return texts


_FOLLOWING = ("name", "model", "task", "recipe")
"""Nodes whose differences the label shows, or that follow from others."""


def _nothing(paths: Sequence[Path], found: Found) -> str:
    failed = f", {len(found.failed)} failed" if found.failed else ""
    return f"{', '.join(map(str, paths))}: no run here or below{failed}"
