"""Rows of a report: runs that differ only in their seeds, with statistics over the seeds."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdeq.report.configuration import Label, differences, label
from fastdeq.report.sweeps import mean_and_deviation
from fastdeq.report.verdict import Metric, Verdict, judge
from fastdeq.runs.identity import digest, without_seeds
from fastdeq.runs.reading import Run

TIMES = ("train/seconds", "train/backward_seconds", "test/seconds", "training_minutes")
METRICS = ("test/accuracy", "test/accuracy_top5", "test/loss", "test/nfe", *TIMES)
"""Metrics of a report, by their names in summary.json."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs of one configuration over their seeds.

    settings: how the row differs from others with the same label; "" if there are none.
    metrics: one for every name of METRICS. reference: the published row (summary.json).
    """

    label: Label
    settings: str
    runs: tuple[Run, ...]
    metrics: Mapping[str, Metric]
    parameters: int
    reference: Mapping[str, Any] | None
    verdict: Verdict

    @property
    def seeds(self) -> int:
        """The number of different seeds."""
        return len({run.seed for run in self.runs})

    def metric(self, name: str) -> Metric:
        """Any metric of summary.json, over the seeds."""
        return self.metrics[name] if name in METRICS else _metric(name, self.runs, None)

    @property
    def judged_by_loss(self) -> bool:
        """Whether the task has no accuracy."""
        return all(self.metrics[name].mean is None for name in METRICS[:2])


def make_rows(runs: Iterable[Run]) -> list[Row]:
    """One row per configuration that was trained, in the published order of models. Runs that only
    tested a checkpoint (mode=test) have no row.

    A seed that was run several times counts once, with the mean of its runs, so that the deviation
    is between seeds.
    """
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        if run.only_tested:
            continue
        same = digest(without_seeds(run.identity))
        groups.setdefault((label(run), same, run.summary["parameters"]), []).append(run)
    labels: dict[Label, list[list[Run]]] = {}
    for (name, *_), members in groups.items():
        labels.setdefault(name, []).append(members)
    rows = []
    for name, alike in labels.items():
        texts = differences([members[0] for members in alike])
        rows += [_row(name, text, runs) for text, runs in zip(texts, alike, strict=True)]
    return sorted(rows, key=lambda row: (row.label.order(), row.settings, row.parameters))


def _row(name: Label, settings: str, members: Sequence[Run]) -> Row:
    runs = tuple(sorted(members, key=lambda run: (run.seed, str(run.summary.get("finished")))))
    reference = _reference(runs)
    # Times of different machines are not averaged.
    timed = len({run.device for run in runs}) == 1
    metrics = {
        metric: _metric(metric, runs if timed or metric not in TIMES else (), reference)
        for metric in METRICS
    }
    return Row(
        label=name,
        settings=settings,
        runs=runs,
        metrics=metrics,
        parameters=runs[0].summary["parameters"],
        reference=reference,
        verdict=judge(runs, metrics, reference),
    )


def _reference(runs: Sequence[Run]) -> Mapping[str, Any] | None:
    """The most complete reference of the runs: older runs have fewer keys."""
    known = [run.reference for run in runs if run.reference is not None]
    return max(known, key=lambda row: (len(row.get("deviations") or {}), len(row)), default=None)


def _metric(name: str, runs: Sequence[Run], reference: Mapping[str, Any] | None) -> Metric:
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        if name in run.metrics:
            by_seed.setdefault(run.seed, []).append(run.metrics[name])
    mean = deviation = None
    if by_seed:
        mean, deviation = mean_and_deviation([statistics.fmean(each) for each in by_seed.values()])
    published = reference or {}
    value = (published.get("metrics") or {}).get(name)
    if name == "training_minutes":  # beside the metrics
        value = published.get(name)
    return Metric(
        mean=mean,
        deviation=deviation,
        n=len(by_seed),
        published=value,
        published_deviation=(published.get("deviations") or {}).get(name),
    )
