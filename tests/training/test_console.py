"""What a run prints: what fits the terminal, the time that is left, and why the training ended."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EarlyStopping, Timer

from fastdeq.runs import log
from fastdeq.runs.log import LOG, log_fitted, logging_to
from fastdeq.training import EpochLines, StepTimer, timing, why_ended
from tests.training.tasks import Listed, make_task, make_trainer, samples

EPOCHS, BATCHES = 3, 2


def fit(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """Train three epochs of two steps."""
    trainer = make_trainer(folder, callbacks=list(callbacks), **{"max_epochs": EPOCHS} | options)
    trainer.fit(make_task(lr=0.1), Listed(*[samples(5)] * BATCHES), Listed(samples(6)))
    return trainer


@pytest.fixture
def restored() -> Iterator[None]:
    """The log of the tests as it was."""
    before = LOG.level, LOG.propagate
    yield
    LOG.setLevel(before[0])
    LOG.propagate = before[1]


def test_lines_of_epochs_fit_the_terminal_and_are_whole_in_the_log_file(
    tmp_path, capsys, monkeypatch, restored
):
    for width in (140, 80, 60, 40):
        monkeypatch.setattr(log, "terminal_width", lambda width=width: width)
        path = tmp_path / f"{width}.log"
        with logging_to(path):
            fit(tmp_path, StepTimer(), EpochLines())
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == 2 + EPOCHS
        assert len({len(line) for line in shown}) == 1  # one table
        assert width / 2 < len(shown[0]) <= width
        assert shown[1].split()[:2] == ["epoch", "left"]
        assert "accuracy" in shown[1]
        written = path.read_text().splitlines()
        assert all(len(line) > 130 for line in written)


def test_lines_of_a_run_beside_others_have_its_prefix(tmp_path, capsys, monkeypatch, restored):
    monkeypatch.setattr(log, "terminal_width", lambda: 60)
    with logging_to(tmp_path / "train.log", "[job 3] "):
        LOG.info("two\nlines")
        log_fitted("long", lambda width: f"{width} are left")
        log_fitted("in the file alone", lambda _: None)
    assert capsys.readouterr().out.splitlines() == [
        *("[job 3] two", "[job 3] lines", "[job 3] 52 are left")
    ]
    assert "[job 3]" not in (tmp_path / "train.log").read_text()
    assert "in the file alone" in (tmp_path / "train.log").read_text()


def test_a_line_of_progress_comes_every_so_many_minutes_within_an_epoch(tmp_path, lines):
    fit(tmp_path, StepTimer(), EpochLines(minutes=1e-9))
    progress = [line for line in lines if " step " in line]
    assert [line.split()[0] for line in progress] == ["1/3", "1/3", "2/3", "2/3", "3/3", "3/3"]
    for number, line in enumerate(progress, start=1):
        assert f"  step {number} of 6, loss " in line
        assert ", NFE " in line
        assert line.split()[1:3][-1] == "s"  # the time left
    lines.clear()
    fit(tmp_path, StepTimer(), EpochLines(minutes=60.0))
    fit(tmp_path, StepTimer(), EpochLines())
    assert not [line for line in lines if " step " in line]


def test_the_time_left_is_that_of_the_steps_left_and_at_most_that_of_the_trainer(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(StepTimer, "seconds_per_step", 10.0)
    found: list[float | None] = []

    class Reads(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            found.append(timing.seconds_left(trainer, pl_module))

    fit(tmp_path, StepTimer(), Reads())
    fit(tmp_path, StepTimer(), Reads(), max_epochs=-1, max_steps=2)
    assert found == [50, 40, 30, 20, 10, 0, 10, 0]
    found.clear()
    fit(tmp_path, StepTimer(), Reads(), Timer(duration={"seconds": 30}), max_epochs=1)
    assert found == [10, 0]
    fit(tmp_path, StepTimer(), Reads(), Timer(duration={"seconds": 5}), max_epochs=1)
    assert all(each is not None and each < 5.001 for each in found[2:])
    found.clear()
    fit(tmp_path, Reads(), max_epochs=1)  # without a timer
    endless = make_trainer(tmp_path, callbacks=[StepTimer(), Reads(), StopsAt(4)], max_epochs=-1)
    task = make_task(lr=0.1)
    task.accumulate_grad_batches = 2
    endless.fit(task, Listed(*[samples(5)] * 3), Listed(samples(6)))
    assert set(found) == {None}
    assert timing.steps_of_run(endless, task) == math.inf
    endless.fit_loop.max_epochs = 5
    assert timing.steps_of_run(endless, task) == 5 * 2  # of three batches, two steps


class StopsAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_why_a_training_ended_is_said(tmp_path):
    patient = EarlyStopping("val/loss", patience=1, min_delta=math.inf)
    for callbacks, options, reason in (
        ((), {}, "trainer.max_epochs=3 is reached"),
        ((), {"max_steps": 3}, "trainer.max_steps=3 is reached"),
        ((), {"max_steps": 6}, "trainer.max_steps=6 is reached"),
        ((Timer(duration={"microseconds": 1}),), {}, "trainer.max_time is over"),
        ((StopsAt(1),), {}, "a callback requested it (trainer.should_stop)"),
        ((patient,), {}, "early stopping: "),
    ):
        said = why_ended(fit(tmp_path, *callbacks, **options))
        assert said.startswith(reason), said
    assert "val/loss" in said
