"""Verdicts: judged against the spread where that is known, and nowhere else."""

import math
from pathlib import Path
from typing import Any

import pytest

from fastdeq.report.rows import Row, make_rows
from fastdeq.report.verdict import margin
from fastdeq.runs.reading import read_run
from tests.experiment.run_folders import MNIST, write_run

# Powers of two, so that means, differences and the margin below are exact.
PUBLISHED = {**MNIST, "metrics": {"test/accuracy": 0.5}, "deviations": {"test/accuracy": 0.0625}}
ALLOWED = 2 * 0.0625 * math.sqrt(1 + 1 / 3)  # of a single seed beside three


def row(folder: Path, *runs: dict[str, Any]) -> Row:
    """The one row of these runs, whose seeds are 0, 1, ... unless they say so."""
    made = [
        write_run(folder / f"run{seed}", **{"settings": {"seed": seed}, **run})
        for seed, run in enumerate(runs)
    ]
    (only,) = make_rows([read_run(run) for run in made])
    return only


def accuracy(value: float, reference: dict[str, Any] | None = PUBLISHED) -> dict[str, Any]:
    return {"metrics": {"test/accuracy": value}, "reference": reference}


# The margin


def test_a_single_seed_is_compared_with_the_interval_of_one_more_published_run():
    assert margin(3.0, 3, None, 1) == pytest.approx(2 * 3 * math.sqrt(4 / 3), rel=1e-15)
    assert margin(0.5, 1, None, 1) == pytest.approx(math.sqrt(2), rel=1e-15)


def test_several_seeds_are_compared_with_two_standard_errors_of_the_difference():
    assert margin(3.0, 9, 4.0, 16) == 2 * math.sqrt(1 + 1)  # 2·√(9/9 + 16/16)
    assert margin(1.0, 3, 0.0, 3) == pytest.approx(2 / math.sqrt(3), rel=1e-15)


@pytest.mark.parametrize(
    ("measured", "word", "distance"),
    [
        (0.5, "within", "+0.00"),
        (0.5 + ALLOWED, "within", "+14.43"),
        (0.5 - ALLOWED, "within", "−14.43"),
        (math.nextafter(0.5 + ALLOWED, 1), "above", "+14.43"),
        (0.5 - ALLOWED - 2**-40, "below", "−14.43"),
        (0.75, "above", "+25.00"),
        (0.25, "below", "−25.00"),
    ],
)
def test_a_difference_of_exactly_the_margin_is_within_and_any_more_is_not(
    tmp_path, measured, word, distance
):
    verdict = row(tmp_path, accuracy(measured)).verdict
    assert verdict.text == f"{word}: {distance} of ±14.43"
    assert verdict.difference == measured - 0.5
    assert verdict.margin == ALLOWED


@pytest.mark.parametrize(("centre", "word"), [(0.5625, "within"), (0.625, "above")])
def test_with_several_seeds_both_spreads_count(tmp_path, centre, word):
    # s = 0.03125·√2, n = 2: 2·√(0.0625²/3 + 0.03125²) = 2·0.03125·√(4/3 + 1) = 0.0955
    verdict = row(tmp_path, accuracy(centre - 0.03125), accuracy(centre + 0.03125)).verdict
    assert verdict.margin == pytest.approx(0.0625 * math.sqrt(7 / 3), rel=1e-12)
    assert verdict.text == f"{word}: +{100 * (centre - 0.5):.2f} of ±9.55"


def test_a_seed_that_was_run_twice_is_one_seed(tmp_path):
    again = {"settings": {"seed": 0}}
    found = row(tmp_path, accuracy(0.5), accuracy(0.75) | again)
    metric = found.metrics["test/accuracy"]
    assert (metric.mean, metric.deviation, metric.n) == (0.625, None, 1)
    assert found.verdict.margin == ALLOWED


def test_a_loss_is_judged_if_no_accuracy_is_published(tmp_path):
    published = {"metrics": {"test/loss": 0.5}, "deviations": {"test/loss": 0.0625}}
    run = {"metrics": {"test/loss": 0.53125}, "reference": {**MNIST, **published}}
    assert row(tmp_path, run).verdict.text == "within: +0.0312 of ±0.144"


def test_top_5_is_judged_if_only_it_is_published(tmp_path):
    name = "test/accuracy_top5"
    published = {"metrics": {name: 0.5}, "deviations": {name: 0.0625}}
    run = {"metrics": {name: 0.75}, "reference": {**MNIST, **published}}
    assert row(tmp_path, run).verdict.text == "above: +25.00 of ±14.43"


# What is not judged

OLDER = {key: MNIST[key] for key in ("source", "where", "metrics", "training_minutes")}
STEPS = {key: value for key, value in PUBLISHED.items() if key != "epochs"} | {"steps": 20000}


@pytest.mark.parametrize(
    ("run", "text"),
    [
        ({"reference": None}, "no reference"),
        ({"reference": {"source": "a metric", "metrics": {}}}, "no reference"),
        ({"reference": {**MNIST, "metrics": {"test/nfe": 4.0}}}, "no reference"),
        ({"reference": OLDER}, "published length unknown; published spread unknown"),
        ({"reference": {**MNIST, "deviations": {}}}, "published spread unknown"),
        ({"reference": {**MNIST, "seeds": None}}, "published spread unknown"),
        ({"reference": MNIST, "epochs": 24}, "short: 24 of 25 epochs"),
        ({"reference": MNIST, "epochs": 50}, "long: 50 of 25 epochs"),
        ({"reference": STEPS, "steps": 120}, "short: 120 of 20,000 steps"),
        ({"reference": STEPS, "steps": 20001}, "long: 20,001 of 20,000 steps"),
        (
            {"reference": MNIST, "settings": {"trainer.limit_test_batches": 1}},
            "partial test: 1 batch",
        ),
        (
            {"reference": MNIST, "settings": {"trainer.limit_test_batches": 0.25}},
            "partial test: 25 %",
        ),
        (
            {"reference": MNIST, "epochs": 2, "settings": {"trainer.limit_train_batches": 30}},
            "short: 2 of 25 epochs; partial training: 30 batches",
        ),
        (
            {"reference": None, "settings": {"trainer.overfit_batches": 2}},
            "partial training: 2 batches; no reference",
        ),
        ({"reference": MNIST, "metrics": {"train/loss": math.nan}}, "diverged"),
        ({"reference": None, "metrics": {"test/loss": math.inf}}, "diverged"),
    ],
)
def test_what_cannot_be_compared_is_not_judged_and_says_why(tmp_path, run, text):
    verdict = row(tmp_path, run).verdict
    assert verdict.text == text
    assert verdict.difference is None
    assert verdict.margin is None


def test_a_run_of_exactly_the_published_steps_is_judged(tmp_path):
    run = {**accuracy(0.5, STEPS), "steps": 20000, "epochs": 52}
    assert row(tmp_path, run).verdict.text == "within: +0.00 of ±14.43"


def test_the_shortest_of_a_rows_runs_counts(tmp_path):
    runs = ({"reference": MNIST}, {"reference": MNIST, "epochs": 3})
    assert row(tmp_path, *runs).verdict.text == "short: 3 of 25 epochs"


def test_one_run_that_diverged_is_enough(tmp_path):
    runs = (accuracy(0.5), {**accuracy(0.5), "metrics": {"train/loss": math.nan}})
    assert row(tmp_path, *runs).verdict.text == "diverged: 1 of 2 runs"


def test_the_most_complete_reference_of_a_row_is_taken(tmp_path):
    older = {"source": MNIST["source"], "metrics": PUBLISHED["metrics"]}
    found = row(tmp_path, accuracy(0.5), accuracy(0.5, older), accuracy(0.5, None))
    assert found.reference == PUBLISHED
    assert found.verdict.text.startswith("within")
