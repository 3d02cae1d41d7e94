"""``fastdeq report``: which runs, rows and columns a table has, and what fits a terminal."""

import io
import json
import math
import platform
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastdeq.report import command as report_command
from fastdeq.runs.lock import run_lock
from tests.experiment.reported import HEADINGS, printed, refused, several_runs, table_of
from tests.experiment.run_folders import unfinished_run, write_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return several_runs()


# Columns, order and choice of rows


@pytest.fixture
def varied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of three models, whose accuracy and NFE are in different orders; one has diverged."""
    monkeypatch.chdir(tmp_path)
    for place, (model, tol, accuracy, nfe) in enumerate(
        (
            ("deq", 0.001, 0.97, 20.0),
            ("skip_mdeq", 0.01, 0.98, 10.0),
            ("skip_deq", 0.01, 0.99, 30.0),
            ("skip_deq", 0.001, math.nan, 5.0),
        )
    ):
        write_run(
            Path(f"outputs/{place}"),
            choices={"model": model},
            settings={"solver.tol": tol},
            metrics={"test/accuracy": accuracy, "test/nfe": nfe, "test/new": nfe / 8},
        )


def test_columns_and_order_are_chosen(capsys, varied):
    def chosen(*options: str) -> list[list[str]]:
        return table_of(printed(capsys, "outputs", *options)[0])

    assert chosen("--columns=model,nfe,test/new", "--sort=nfe") == [
        ["model", "test NFE", "test/new"],
        ["Skip DEQ", "5.00", "0.625"],
        ["Multiscale Skip DEQ", "10.00", "1.25"],
        ["DEQ", "20.00", "2.5"],
        ["Skip DEQ", "30.00", "3.75"],
    ]
    best = chosen("--columns=nfe", "--sort=-accuracy")  # what is not a number comes last
    assert best[1:] == [["30.00"], ["10.00"], ["20.00"], ["5.00"]]
    assert chosen("--columns=nfe", "--sort=model,-nfe")[1:] == [
        ["20.00"],
        ["10.00"],
        ["30.00"],
        ["5.00"],
    ]
    wide = json.loads(printed(capsys, "outputs", "--sort=nfe", "--format=json")[0])
    assert [row["metrics"]["test/nfe"]["mean"] for row in wide] == [5, 10, 20, 30]


def test_runs_are_chosen_by_groups_and_settings(capsys, varied):
    for where, nfe in (
        (("model=deq",), ["20.00"]),
        (("model=deq,skip_mdeq",), ["20.00", "10.00"]),
        (("solver.tol=1e-2",), ["30.00", "10.00"]),
        (("solver.tol=0.01", "model=skip_deq"), ["30.00"]),
        (("checkpoint=null", "model=deq"), ["20.00"]),
    ):
        options = [f"--where={each}" for each in where]
        out = printed(capsys, "outputs", "--columns=nfe", *options)[0]
        assert [cell for (cell,) in table_of(out)[1:]] == nfe, where


def test_names_that_no_run_has_are_refused_with_the_nearest(capsys, varied):
    for option, text in (
        ("--columns=modle", "unknown column 'modle': did you mean model?"),
        ("--sort=-acuracy", "unknown column 'acuracy': did you mean accuracy?"),
        ("--where=solver.tl=1", "unknown key of --where 'solver.tl': did you mean solver.tol?"),
        ("--where=model=dq", "no run has model=dq: there are deq, skip_deq, skip_mdeq"),
        ("--where=solver.tol=5", "no run has solver.tol=5: there are 0.001, 0.01"),
    ):
        assert refused(capsys, "outputs", option, status=1) == text


# A terminal


def test_on_a_terminal_the_table_fits_and_names_what_is_left_out(capsys, runs, monkeypatch):
    before: set[str] | None = None
    for width in (250, 140, 100, 80, 60, 20):
        monkeypatch.setattr(report_command, "terminal_width", lambda width=width: width)
        lines = printed(capsys, "outputs")[0].splitlines()
        headings = set(re.split(r" {2,}", lines[0].strip()))
        assert before is None or headings < before or width == 140
        assert max(map(len, lines[: lines.index("")])) <= width
        left = "left out for the width: " in " ".join(" ".join(lines).split())
        assert left == (headings != set(HEADINGS))
        before = headings
    assert before == {"model"}
    assert "|" not in lines[0]
    monkeypatch.setattr(report_command, "terminal_width", lambda: 80)
    out = printed(capsys, "outputs", "--columns=model,nfe")[0]
    assert out.splitlines()[0].split() == ["model", "test", "NFE"]
    assert "DEQ    9.00 ± 1.00 [18.34 ± 0.73]" in out
    assert "left out" not in out
    # What is written to a file, or in a format that is named, is as without a terminal.
    assert printed(capsys, "outputs", "--format=markdown")[0].startswith("| model |")


# Runs that are not rows


def test_a_run_that_only_tests_has_no_row_and_is_named(capsys, tmp_path):
    write_run(tmp_path / "a")
    tested = write_run(tmp_path / "b", settings={"mode": "test"})
    out = printed(capsys, str(tmp_path))[0]
    assert len(table_of(out)) == 2
    assert f"- 1 run tests a checkpoint and has no row (mode=test): {tested}\n" in out
    text = refused(capsys, str(tested), status=1)
    assert text.endswith("no finished run here or below, 0 unfinished, 0 failed, 1 of mode=test")


def test_a_run_without_a_summary_is_named_with_its_status_and_how_far_it_came(capsys, tmp_path):
    write_run(tmp_path / "done")
    folder = unfinished_run(tmp_path / "run")
    said = {}
    for status in ("created", "running", "interrupted", "failed"):
        content = {"status": status, "error": "by SIGTERM", "host": platform.node()}
        (folder / "status.json").write_text(json.dumps(content))
        said[status] = printed(capsys, str(tmp_path))[0].splitlines()[-1]
        assert refused(capsys, str(folder), status=1) == said[status].removeprefix("- ")
    assert said == {
        "created": f"- {folder} is unfinished: it has no summary.json; no epoch has ended",
        "running": f"- {folder} was killed; no epoch has ended",
        "interrupted": f"- {folder} was interrupted (by SIGTERM); no epoch has ended",
        "failed": f"- {folder} has failed (by SIGTERM); no epoch has ended",
    }
    headings = "epoch,step/loss,val/accuracy,val/loss,val/nfe"
    rows = ("0,1.5,,,", "0,,0.5,1.2,7", "1,,0.75,0.8,6.5", "2,0.5,,,")
    (folder / "metrics.csv").write_text("\n".join([headings, *rows]))
    (folder / "status.json").write_text(json.dumps({"status": "running", "host": "elsewhere"}))
    said_now = printed(capsys, str(tmp_path))[0].splitlines()[-1]
    assert said_now == (
        f"- {folder} was killed, or runs on elsewhere; epoch 2: accuracy 0.75, loss 0.8, nfe 6.5"
    )
    with run_lock(folder):
        said_now = printed(capsys, str(tmp_path))[0].splitlines()[-1]
    assert said_now.startswith(f"- {folder} is still running; epoch 2: ")


def test_a_sweep_of_which_no_job_has_ended_is_named(capsys, tmp_path):
    sweep = tmp_path / "multirun" / "1"
    sweep.mkdir(parents=True)
    (sweep / "multirun.yaml").write_text("")
    text = f"{sweep} is a sweep of which no job has ended: give the folder of its runs, or wait"
    assert refused(capsys, str(sweep), status=1) == text
    write_run(tmp_path / "a")
    assert printed(capsys, str(tmp_path))[0].splitlines()[-1] == f"- {text}"


def test_a_run_without_test_metrics_has_a_row_without_them(capsys, tmp_path):
    folder = write_run(tmp_path / "a")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "metrics": {}}))
    headings, cells = table_of(printed(capsys, str(tmp_path))[0])
    assert dict(zip(headings, cells, strict=True))["model"] == "DEQ"
    assert "test accuracy %" not in headings


def test_of_every_run_two_files_are_read(capsys, tmp_path, monkeypatch):
    for place in range(5):
        folder = write_run(tmp_path / "outputs" / str(place), settings={"seed": place})
        (folder / "metrics.csv").write_text("epoch\n")
        (folder / "status.json").write_text("{}")
    opened: list[str] = []
    real = io.open

    def counted(path: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(io, "open", counted)  # as Path.open calls it
    printed(capsys, str(tmp_path / "outputs"))
    mine = [path for path in opened if path.startswith(str(tmp_path))]
    assert Counter(Path(path).name for path in mine) == {"summary.json": 5, "config.yaml": 5}
