"""Tables about runs: every metric under its heading, every mean with its spread."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fastdeq.report import SweepTable, fit, groups, heading, read_jobs, row
from fastdeq.report.columns import Group, duration
from fastdeq.report.sweeps import SweepJob, mean_and_deviation

# Columns

METRICS = {
    "train/nfe": 12.0,
    "train/accuracy": 0.98765,
    "train/loss": 0.125,
    "train/seconds": 0.0123,
    "train/residual": 0.0004,
    "val/nfe": 7.25,
    "val/accuracy": 1.0,
    "val/loss": 12.5,
    "val/seconds": 1.5,
    "val/explicit_accuracy": 0.5,
    "val/explicit_loss": 0.75,
    "val/explicit_seconds": 0.001,
}


def ends(line: str) -> list[int]:
    """Where the words of a line end; a percent sign belongs to the number before it."""
    return [found.end() for found in re.finditer(r"\S+( %)?", line)]


def full(**options: Any) -> tuple[Group, ...]:
    title = options.pop("title", "test")
    return groups("val", title, **{"accuracy": True, "explicit": True, "residual": True} | options)


@pytest.mark.parametrize("accuracy", [True, False])
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("loss", ["{:.4f}", "{:.2e}"])
def test_every_metric_ends_where_its_heading_ends(accuracy, explicit, residual, loss):
    table = full(accuracy=accuracy, explicit=explicit, residual=residual, loss=loss)
    _, names = heading(table, "epoch").splitlines()
    line = row(table, "10/300", METRICS)
    assert ends(line)[1:] == ends(names)[1:]
    metrics = 6 + 2 * accuracy + residual + explicit * (2 + accuracy)
    assert len(ends(line)) == 1 + metrics


def test_a_groups_title_spans_its_columns():
    titles, names = heading(full(), "epoch").splitlines()
    assert len(titles) == len(names)
    spans = [found.span() for found in re.finditer(r"\S+ ─+", titles)]
    words = [titles[start:].split()[0] for start, _ in spans]
    assert words == ["train", "test", "explicit"]
    last = ["residual", "ms", "ms"]
    assert [names[:stop].split()[-1] for _, stop in spans] == last
    assert [names[:stop].rstrip() for _, stop in spans] == [names[:stop] for _, stop in spans]


def test_metrics_are_shown_in_their_units():
    assert row(full(), "1/2", METRICS).split("  ")[0] == "1/2"
    cells = re.findall(r"\S+(?: %)?", row(full(), "1/2", METRICS))[1:]
    train = ["12.00", "98.77 %", "0.1250", "12.3", "4e-04"]
    test = ["7.25", "100.00 %", "12.5000", "1500.0"]
    assert cells == [*train, *test, "50.00 %", "0.7500", "1.0"]


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_missing_metric_leaves_its_place_blank_and_the_others_where_they_are(name):
    metrics = {key: value for key, value in METRICS.items() if key != name}
    whole, line = row(full(), "1/2", METRICS), row(full(), "1/2", metrics)
    kept = [place for place in ends(whole) if place in ends(line)]
    assert len(kept) == len(ends(whole)) - 1 == len(ends(line))


@pytest.mark.parametrize(
    ("broken", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (6.8e29, "6.8e+29")]
)
def test_the_loss_of_a_run_that_diverges_is_shown_in_its_place(broken, shown):
    line = row(full(), "1/2", {**METRICS, "val/loss": broken})
    assert f" {shown} " in line
    assert ends(line) == ends(row(full(), "1/2", METRICS))


def test_a_row_without_metrics_is_its_name():
    assert row(full(), "published", {}) == "published"


def test_a_narrow_terminal_loses_the_least_important_columns_first():
    table, before = full(), None
    for width in range(140, 5, -1):
        kept = [column.metric for group in fit(table, width) for column in group.columns]
        names = heading(fit(table, width), "epoch").splitlines()[1]
        assert len(names) <= 9 + width or len(kept) == 1
        assert before is None or set(kept) <= set(before)
        before = kept
    assert before == ["val/accuracy"]
    shown = heading(fit(table, 62), "epoch").splitlines()[1].split()
    assert shown == ["epoch", "NFE", "loss", "NFE", "accuracy", "loss", "accuracy"]
    regression = fit(full(accuracy=False, title="validation"), 5)
    assert [column.metric for group in regression for column in group.columns] == ["val/loss"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (2e5, "2.3 d")],
)
def test_a_duration_has_one_unit(seconds, text):
    assert duration(seconds) == text


# Sweeps


def job(number: int, accuracy: float | None, **overrides: str) -> SweepJob:
    """A finished job, or with None one that failed."""
    done = accuracy is not None
    return SweepJob(
        number=number,
        overrides=overrides,
        folder=f"run{number}" if done else None,
        error=None if done else "out of luck",
        summary=(
            {"metrics": {"test/accuracy": accuracy, "test/nfe": 10.0}, "train_seconds": 60.0}
            if done
            else None
        ),
    )


def column(table: list[list[str]], name: str) -> list[str]:
    place = table[0].index(name)
    return [line[place] for line in table[1:]]


def test_seeds_share_a_row_with_mean_and_sample_deviation():
    table = SweepTable([job(i, share, seed=str(i)) for i, share in enumerate((0.9, 0.92, 0.97))])
    # Mean 93; √((3² + 1² + 4²) / 2) = 3.6056
    assert column(table.rows(), "test accuracy %") == ["93.00 ± 3.61"]
    assert column(table.rows(), "test NFE") == ["10.00 ± 0.00"]
    assert column(table.rows(), "training s") == ["60.0 ± 0.0"]
    assert column(table.rows(), "runs") == ["3"]


def test_settings_that_differ_have_rows_and_columns_and_others_have_not():
    jobs = [
        job(0, 0.90, model="deq", solver="anderson", seed="0"),
        job(1, 0.92, model="deq", solver="anderson", seed="1"),
        job(2, 0.80, model="skip_deq", solver="anderson", seed="0"),
        job(3, 0.84, model="skip_deq", solver="anderson", seed="1"),
    ]
    table = SweepTable(jobs).rows()
    assert table[0][:2] == ["model", "runs"]
    assert column(table, "model") == ["deq", "skip_deq"]
    assert column(table, "test accuracy %") == ["91.00 ± 1.41", "82.00 ± 2.83"]


def test_a_setting_that_some_jobs_lack_is_blank_there():
    jobs = [job(0, 0.9, model="deq"), job(1, 0.8, model="deq", **{"loss.jacobian": "1"})]
    table = SweepTable(jobs).rows()
    assert column(table, "loss.jacobian") == ["", "1"]


def test_a_single_seed_has_no_deviation():
    table = SweepTable([job(0, 0.9, model="deq"), job(1, 0.8, model="skip_deq")])
    assert "±" not in table.markdown()
    assert column(table.rows(), "test accuracy %") == ["90.00", "80.00"]


def test_failed_jobs_are_counted_and_are_in_no_mean():
    jobs = [job(0, 0.9, seed="0", model="deq"), job(1, None, seed="1", model="deq")]
    jobs += [job(2, None, seed="0", model="skip_deq"), job(3, None, seed="1", model="skip_deq")]
    table = SweepTable(jobs).rows()
    assert column(table, "runs") == ["1 of 2", "0 of 2"]
    assert column(table, "test accuracy %") == ["90.00", ""]


def test_a_sweep_of_failures_has_a_table_without_metrics():
    table = SweepTable([job(0, None, seed="0"), job(1, None, seed="1")])
    assert table.rows() == [["runs"], ["0 of 2"]]


def test_metrics_that_no_job_has_get_no_column():
    assert SweepTable([job(0, 0.9)]).rows()[0] == [
        "runs",
        "test accuracy %",
        "test NFE",
        "training s",
    ]


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_metric_that_is_not_finite_stays_visible(broken):
    table = SweepTable([job(0, 0.9, seed="0"), job(1, broken, seed="1")]).rows()
    assert column(table, "test accuracy %") == [f"{broken} ± nan"]


def test_the_deviation_is_that_of_a_sample():
    assert mean_and_deviation([1.0, 3.0]) == (2.0, math.sqrt(2))  # √((1 + 1) / (2 − 1))
    assert mean_and_deviation([4.0]) == (4.0, None)


def test_markdown_and_csv_have_the_same_cells(tmp_path):
    jobs = [job(i, 0.9, seed=f"{i}", model=model) for i, model in enumerate(["deq", "a,b", "deq"])]
    table = SweepTable(jobs)
    table.write(tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    assert set(lines.pop(1)) == {"|", "-"}
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    with (tmp_path / "table.csv").open(newline="") as file:
        assert list(csv.reader(file)) == cells == table.rows()


def test_on_a_narrow_terminal_a_sweep_keeps_settings_and_scores():
    jobs = [job(0, 0.9, model="deq", seed="1"), job(1, 0.8, model="skip_deq", seed="1")]
    table = SweepTable(jobs)
    for width, headings in (
        (80, ["model", "runs", "test accuracy %", "test NFE", "training s"]),
        (45, ["model", "runs", "test accuracy %", "test NFE"]),
        (32, ["model", "runs", "test accuracy %"]),
        (9, ["model"]),
    ):
        first, _, *rows = table.for_terminal(width).splitlines()
        assert re.split(r" {2,}", first.strip()) == headings
        assert [line.split()[0] for line in rows] == ["deq", "skip_deq"]
        assert len(first) <= width


def test_jobs_are_read_in_their_order_with_their_summaries(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    for number in (10, 2, 1):  # as text, 10 would come before 2
        folder = tmp_path / f"run{number}"
        record: dict[str, Any] = {"overrides": {"seed": f"{number}"}, "folder": str(folder)}
        record["error"] = "out of luck" if number == 2 else None
        (tmp_path / "jobs" / f"{number}.json").write_text(json.dumps(record))
        if number != 2:
            folder.mkdir()
            summary = {"format": 2, "metrics": {"test/loss": number / 2}, "train_seconds": number}
            (folder / "summary.json").write_text(json.dumps(summary))
    jobs = read_jobs(tmp_path)
    assert [job.number for job in jobs] == [1, 2, 10]
    assert [job.overrides["seed"] for job in jobs] == ["1", "2", "10"]
    assert [job.metric("test/loss") for job in jobs] == [0.5, None, 5.0]
    assert [job.metric("train_seconds") for job in jobs] == [1.0, None, 10.0]
    assert [job.error for job in jobs] == [None, "out of luck", None]
