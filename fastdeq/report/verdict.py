"""Comparison of a measured metric with the published one, and the reasons not to compare."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdeq.runs.identity import Leaf
from fastdeq.runs.reading import Run

QUALITY = ("test/accuracy", "test/accuracy_top5", "test/loss")
"""A verdict compares the first of these metrics that is published."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric over the seeds of a row, in the units of summary.json, beside the published one.

    mean: None if no run has the metric. deviation: sample deviation (n − 1); None for one seed.
    n: number of seeds that have the metric.
    """

    mean: float | None = None
    deviation: float | None = None
    n: int = 0
    published: float | None = None
    published_deviation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A verdict in words. difference: ours minus published. margin: the largest difference that
    counts as within. Both are None if the row is not judged.
    """

    text: str
    difference: float | None = None
    margin: float | None = None


def judge(
    runs: Sequence[Run], metrics: Mapping[str, Metric], reference: Mapping[str, Any] | None
) -> Verdict:
    """Whether the runs of a row are within, above or below the published spread.

    reference: the published row, as in summary.json. Runs that diverged, had another length than
    the published ones or used part of the data, and metrics without a published spread are not
    judged; the text then gives the reason. Times are never judged, since the machines differ.
    """
    if broken := sum(run.diverged for run in runs):
        share = "" if broken == len(runs) else f": {broken} of {len(runs)} runs"
        return Verdict(text=f"diverged{share}")
    obstacles = _partial(runs[0].settings)
    name = next((name for name in QUALITY if reference and name in reference["metrics"]), None)
    metric = metrics.get(name) if name is not None else None
    if reference is None or name is None or metric is None or metric.mean is None:
        return Verdict(text="; ".join([*obstacles, "no reference"]))
    obstacles = [*_length(runs, reference), *obstacles]
    seeds, spread = reference.get("seeds"), metric.published_deviation
    if not seeds or spread is None:
        obstacles.append("published spread unknown")
    if obstacles or metric.published is None or not seeds or spread is None:
        return Verdict(text="; ".join(obstacles))
    allowed = margin(spread, seeds, metric.deviation, metric.n)
    return _compared(metric.mean - metric.published, allowed, 1.0 if name == "test/loss" else 100.0)


def margin(published: float, seeds: int, ours: float | None, n: int) -> float:
    """The largest difference of two means that counts as within.

        n ≥ 2: 2·√(s₀²/seeds + s²/n)      n = 1: 2·s₀·√(1 + 1/seeds)

    published: s₀, deviation over `seeds` published seeds. ours: s, deviation over n seeds, None for
    n = 1. The first is two standard errors of the difference (Welch: the two spreads need not be
    equal). A single run has no spread of its own: the second is the interval in which one
    more run of the published kind is predicted. The factor is 2, not a quantile of Student's t: of
    normal metrics with equal settings, 82 % (one seed beside three: 2 degrees of freedom) to 88 %
    (three beside three of equal spread: 4) come out within.
    """
    if ours is None:
        return 2 * published * math.sqrt(1 + 1 / seeds)
    return 2 * math.sqrt(published**2 / seeds + ours**2 / n)


def _compared(difference: float, allowed: float, factor: float) -> Verdict:
    word = "within" if abs(difference) <= allowed else "above" if difference > 0 else "below"
    text = "{:.2f}" if factor == 100 else "{:.3g}"
    sign = "+" if difference >= 0 else "−"
    distance = f"{sign}{text.format(factor * abs(difference))}"
    return Verdict(
        text=f"{word}: {distance} of ±{text.format(factor * allowed)}",
        difference=difference,
        margin=allowed,
    )


def _length(runs: Sequence[Run], reference: Mapping[str, Any]) -> list[str]:
    """How the length of the runs differs from the published one; empty if it does not."""
    for unit in ("steps", "epochs"):
        if not (published := reference.get(unit)):
            continue
        lengths = [int(run.summary[unit]) for run in runs]
        if min(lengths) < published:
            return [f"short: {min(lengths):,} of {published:,} {unit}"]
        return [f"long: {max(lengths):,} of {published:,} {unit}"] * (max(lengths) > published)
    return ["published length unknown"]


_CUT = {
    "trainer.overfit_batches": "training",
    "trainer.limit_train_batches": "training",
    "trainer.limit_test_batches": "test",
}


def _partial(settings: Mapping[str, Leaf]) -> list[str]:
    """Which data were limited, by a share below 1.0 or by a number of batches."""
    found: dict[str, str] = {}
    for key, what in _CUT.items():
        limit = settings.get(key)
        if not limit or (
            isinstance(limit, float) and limit >= 1
        ):  # overfit_batches is 0 by default
            continue
        many = "1 batch" if limit == 1 else f"{limit} batches"
        amount = f"{100 * limit:g} %" if isinstance(limit, float) else many
        found.setdefault(what, f"partial {what}: {amount}")
    return list(found.values())
