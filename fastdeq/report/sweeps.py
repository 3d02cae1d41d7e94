"""The table at the end of a sweep: mean ± standard deviation over seeds, one row per setting."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdeq.report.markdown import aligned
from fastdeq.report.terminal import shown
from fastdeq.runs.files import write_text
from fastdeq.runs.folder import TABLE_CSV, TABLE_MARKDOWN
from fastdeq.runs.reading import job_records, read_summary

SEED = "seed"

# heading, key of summary.json or of its "metrics", format, factor
_COLUMNS = (
    ("test accuracy %", "test/accuracy", "{:.2f}", 100.0),
    ("test loss", "test/loss", "{:.3g}", 1.0),
    ("without a solve %", "test/explicit_accuracy", "{:.2f}", 100.0),
    ("explicit loss", "test/explicit_loss", "{:.3g}", 1.0),
    ("test NFE", "test/nfe", "{:.2f}", 1.0),
    ("unconverged %", "test/unconverged", "{:.2f}", 100.0),
    ("ms per training step", "train_ms_per_step", "{:.1f}", 1.0),
    ("training s", "train_seconds", "{:.1f}", 1.0),
)

_DROPPED = ("training s", "ms per training step", "unconverged %", "explicit loss")
"""Columns that a narrow terminal loses first."""


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One job of a sweep: its overrides, run folder, error and summary (None: not finished)."""

    number: int
    overrides: dict[str, str]
    folder: str | None
    error: str | None
    summary: dict[str, Any] | None
    interrupted: bool = False

    def metric(self, name: str) -> float | None:
        """A metric, or another number of the summary."""
        if self.summary is None:
            return None
        value = self.summary["metrics"].get(name, self.summary.get(name))
        return None if value is None else float(value)

    @property
    def score(self) -> float:
        """What a search optimizes; NaN for a job that has not finished."""
        return math.nan if self.summary is None else float(self.summary["score"]["value"])


def read_jobs(folder: Path) -> list[SweepJob]:
    """The jobs of a sweep's folder in their order, with their summaries."""
    jobs = []
    for number, record in job_records(folder):
        summary = read_summary(Path(record["folder"])) if record["error"] is None else None
        jobs.append(SweepJob(number=number, summary=summary, **record))
    return jobs


class SweepTable:
    """A table with one row for all jobs that differ only in their seed."""

    def __init__(self, jobs: Sequence[SweepJob]) -> None:
        keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
        self.varied = [
            key for key in keys if key != SEED and len({job.overrides.get(key) for job in jobs}) > 1
        ]
        self.groups: dict[tuple[str, ...], list[SweepJob]] = {}
        for job in jobs:
            row = tuple(job.overrides.get(key, "") for key in self.varied)
            self.groups.setdefault(row, []).append(job)
        self.columns = [
            column for column in _COLUMNS if any(job.metric(column[1]) is not None for job in jobs)
        ]

    def rows(self) -> list[list[str]]:
        """Headings, then one row per setting: settings, runs done of runs started, metrics."""
        table = [[*self.varied, "runs", *(column[0] for column in self.columns)]]
        for settings, jobs in self.groups.items():
            done = sum(job.summary is not None for job in jobs)
            runs = f"{done}" if done == len(jobs) else f"{done} of {len(jobs)}"
            table.append([*settings, runs, *(_cell(column, jobs) for column in self.columns)])
        return table

    def markdown(self) -> str:
        """The table with aligned columns."""
        return aligned(self.rows())

    def for_terminal(self, width: int) -> str:
        """The columns that fit a terminal; `write` has all."""
        columns = zip(*self.rows(), strict=True)
        return shown({column[0]: column for column in columns}, width, _DROPPED)[0]

    def write(self, folder: Path) -> None:
        """table.md, and table.csv with the same cells."""
        cells = io.StringIO()
        csv.writer(cells).writerows(self.rows())
        write_text(folder / TABLE_MARKDOWN, self.markdown() + "\n")
        write_text(folder / TABLE_CSV, cells.getvalue())


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1). The deviation is None for a single value, and NaN
    if not all values are finite.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    # statistics.stdev raises AttributeError for infinite numbers and NaN.
    return mean, statistics.stdev(values) if math.isfinite(mean) else math.nan


def _cell(column: tuple[str, str, str, float], jobs: Sequence[SweepJob]) -> str:
    _, metric, text, factor = column
    values = [factor * value for job in jobs if (value := job.metric(metric)) is not None]
    if not values:
        return ""
    mean, deviation = mean_and_deviation(values)
    return text.format(mean) + ("" if deviation is None else f" ± {text.format(deviation)}")
