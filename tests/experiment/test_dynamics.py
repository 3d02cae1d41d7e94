"""`fastdeq report dynamics`: the picture of three runs, and the runs that have none."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fastdeq import cli, experiment
from fastdeq.runs.folder import recording_file
from fastdeq.runs.recorded import BatchRecord, RecordedSolves, SolveRecord, write_recording
from tests.configurations import composed
from tests.experiment.run_folders import write_run

pytest.importorskip("matplotlib")

SAMPLES = 9


def a_run(folder: Path, model: str, *, steps: int = 4, width: int = 1) -> Path:
    write_run(folder, choices={"model": model})
    counts, share = np.full(SAMPLES, steps), np.full(SAMPLES, 1e-3)
    x = np.linspace(1, -1, SAMPLES)[:, None]
    states = np.stack([x * k / steps for k in range(steps + 1)]).repeat(width, axis=2)
    solve = SolveRecord(
        nfe=counts,
        steps=counts,
        status=counts * 0,
        residual=share,
        relative_residual=share,
        states=states,
    )
    recording = RecordedSolves(
        stage="test",
        epoch=3,
        step=30,
        nfe=counts,
        status=counts * 0,
        relative_residual=share,
        batches={0: BatchRecord(forward=solve, inputs=x, targets=x**2)},
    )
    write_recording(recording_file(folder, None), recording)
    return folder


def dynamics(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastdeq"])
    return cli.dispatch(["report", "dynamics", *words])


def test_runs_are_drawn_side_by_side_as_an_animation_and_a_still(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    folders = [
        str(a_run(tmp_path / "skip", "skip_deq", steps=2)),
        str(a_run(tmp_path / "deq", "deq", steps=5)),
    ]
    assert dynamics(monkeypatch, *folders, "--out", str(tmp_path / "plots")) == 0
    with image.open(tmp_path / "plots" / "dynamics.gif") as animation:
        assert animation.n_frames == 6
    with image.open(tmp_path / "plots" / "dynamics.png") as still:
        assert still.width > still.height


def test_states_of_an_experiment_are_those_of_its_solver(tmp_path):
    from fastdeq.report.dynamics import dynamics_of
    from fastdeq.report.records import read_record

    words = ("experiment=dynamics", "trainer.max_epochs=1", "trainer.accelerator=cpu")
    folder = experiment.run_config(
        composed(*words, "data.samples=32", f"paths.run={tmp_path / 'run'}")
    )
    record, notes = read_record(folder)
    assert not notes
    panel = dynamics_of(record)
    assert panel.title == "Skip DEQ"
    assert panel.x.tolist() == sorted(panel.x.tolist())
    assert panel.states.shape == (panel.steps + 1, 128)
    assert panel.target[0] == pytest.approx(-2.819, abs=1e-3)  # h(−2)


def test_runs_without_a_picture_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "plain")
    a_run(tmp_path / "wide", "deq", width=3)
    for name in "abcde":
        a_run(tmp_path / "many" / name, "deq")
    for name, text in (
        ("plain", "has not recorded its states: train it with +callbacks.record.states=true"),
        ("wide", "has states of 3 numbers for inputs of 1"),
        ("many", "5 runs are found, but the picture has 4 panels at most"),
    ):
        assert dynamics(monkeypatch, str(tmp_path / name)) == 1
        assert text in capsys.readouterr().err.splitlines()[-1]
