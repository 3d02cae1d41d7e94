"""`fastdeq report plots`: what is drawn of finished, unfinished and different runs."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeq import cli
from fastdeq.report.records import MOST, read_record, read_records
from fastdeq.runs.folder import recording_file
from fastdeq.runs.recorded import BatchRecord, RecordedSolves, SolveRecord, write_recording
from tests.experiment.run_folders import unfinished_run, write_run

SHARES = {"f": 0.2, "solver": 0.3, "adjoint": 0.3, "other": 0.2}


def write_metrics(folder: Path, epochs: int = 3) -> None:
    names = ("train/loss", "val/loss", "val/accuracy", "val/nfe", "val/spectral_radius")
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["epoch", "step", *names])
        table.writeheader()
        for epoch in range(epochs):
            numbers = {name: (place + 1) / (epoch + 2) for place, name in enumerate(names)}
            table.writerow({"epoch": epoch, "step": 10 * epoch, **numbers})


def write_solves(folder: Path, scale: float = 1.0) -> None:
    share = np.array([1e-3, 2e-3])
    traced = scale * np.array([[1.0, 2.0], [0.1, 0.0], [0.001, 0.0]])
    solve = SolveRecord(
        nfe=np.array([3, 9]),
        steps=np.array([2, 1]),
        status=np.array([0, 0]),
        residual=share,
        relative_residual=share,
        residuals=traced,
        norm=np.array([1.0, 1.0]),
    )
    recording = RecordedSolves(
        stage="test",
        epoch=3,
        step=30,
        nfe=solve.nfe,
        status=solve.status,
        relative_residual=share,
        batches={0: BatchRecord(forward=solve, backward=solve)},
    )
    write_recording(recording_file(folder, None), recording)


def a_run(folder: Path, **settings: Any) -> Path:
    write_run(folder, settings=settings, train_time_shares=SHARES, train_ms_per_step=12.5)
    write_metrics(folder)
    write_solves(folder)
    return folder


def plots(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastdeq"])
    return cli.dispatch(["report", "plots", *words])


def test_a_run_is_drawn_as_png_and_pdf(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    folder = a_run(tmp_path / "run")
    assert plots(monkeypatch, str(folder), "--out", str(tmp_path / "plots")) == 0
    answer = capsys.readouterr()
    assert not answer.err
    written = {path.name for path in (tmp_path / "plots").iterdir()}
    names = ("training", "nfe", "convergence", "spectral_radius", "time")
    assert written == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert all(name in answer.out for name in written)


def test_a_start_that_is_the_equilibrium_already_is_drawn_as_that(tmp_path):
    drawing = pytest.importorskip("fastdeq.report.plots", exc_type=ImportError)
    write_solves(a_run(tmp_path / "run"), scale=0.0)
    record, _ = read_record(tmp_path / "run")
    plot = drawing.draw("convergence", [record])
    for axis in plot.axes:
        assert [text.get_text() for text in axis.texts][:1] == ["no residual above 0"]


def test_what_is_missing_is_one_line_and_the_rest_is_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    a_run(tmp_path / "runs" / "a")
    a_run(tmp_path / "runs" / "b", **{"data._target_": "fastdeq.data.DigitsDataModule"})
    write_metrics(unfinished_run(tmp_path / "runs" / "under_way"), epochs=1)
    unfinished_run(tmp_path / "runs" / "without_metrics")
    write_run(tmp_path / "runs" / "foreign")
    (tmp_path / "runs" / "foreign" / "recorded").mkdir()
    (tmp_path / "runs" / "foreign" / "recorded" / "test.h5").write_text("text")
    assert plots(monkeypatch, str(tmp_path / "runs"), "--out", str(tmp_path / "plots")) == 0
    notes = capsys.readouterr().err.splitlines()
    for text in (
        "under_way is unfinished: what it has written so far is drawn",
        "without_metrics has no metrics yet: metrics.csv is missing or empty",
        "test.h5 holds no equilibria that fastdeq has recorded",
        "the runs are of 2 data sets (MnistDataModule, DigitsDataModule)",
    ):
        assert sum(text in note for note in notes) == 1, text
    assert (tmp_path / "plots" / "convergence.png").exists()


def test_runs_with_nothing_to_draw_and_paths_without_runs_are_errors(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    unfinished_run(tmp_path / "runs" / "new")
    assert plots(monkeypatch, str(tmp_path / "runs")) == 1
    assert "nothing to draw yet" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "empty").mkdir()
    assert plots(monkeypatch, str(tmp_path / "empty")) == 1
    assert "no run folder here or below" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("fastdeq.report.plots")]:
        monkeypatch.delitem(sys.modules, name)
    assert plots(monkeypatch, str(tmp_path)) == 1
    printed = capsys.readouterr().err
    assert printed.startswith('error: fastdeq report plots needs matplotlib: pip install "')
    assert printed.endswith('[experiment,plots]"\n')


def test_labels_differ_by_the_settings_or_else_by_the_folder(tmp_path):
    for name, settings in (
        ("a", {"seed": 1}),
        ("b", {"seed": 1, "loss.jacobian": 1.0}),
        ("c", {"seed": 2}),
    ):
        a_run(tmp_path / name, **settings)
    records, notes = read_records([tmp_path])
    assert not notes
    assert [record.label for record in records] == [
        "deq_lbroyden s1 loss.jacobian=0",
        "deq_lbroyden s1 loss.jacobian=1",
        "deq_lbroyden s2",
    ]
    a_run(tmp_path / "d", seed=2)
    labels = [record.label for record in read_records([tmp_path])[0]]
    assert labels[2:] == ["deq_lbroyden s2 loss.jacobian=0 c", "deq_lbroyden s2 loss.jacobian=0 d"]


def test_more_runs_than_can_be_told_apart_are_left_out_with_a_note(tmp_path):
    for number in range(MOST + 2):
        a_run(tmp_path / f"{number:02}", seed=number)
    records, notes = read_records([tmp_path])
    assert len(records) == MOST
    assert notes == ["2 of 14 runs are left out of the plots: 12 at most"]
