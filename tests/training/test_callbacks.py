"""Callbacks: phases, timers, lines, checkpoints and the bar."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import Logger
from torch import Tensor

from fastdeq.report import heading, row
from fastdeq.runs.folder import BEST, LAST
from fastdeq.solution import Solution, Status
from fastdeq.training import (
    AbstractTask,
    ClassificationTask,
    EpochLines,
    Pretraining,
    ProgressBar,
    RegressionTask,
    StepTimer,
    checkpoints,
    table_of,
)
from fastdeq.training.loggers import console
from tests.training.tasks import (
    Listed,
    make_task,
    make_trainer,
    metrics_of,
    samples,
    take_step_settings,
    trained,
)

BATCHES = 2  # an epoch


def fit(
    task: AbstractTask, folder: Path, *callbacks: Callback, resume: Path | None = None, **more: Any
) -> Trainer:
    """Train epochs of two batches, and validate on one after each."""
    take_step_settings(task, more)
    trainer = make_trainer(folder, callbacks=list(callbacks), **more)
    kind = type(task)
    trainer.fit(
        task,
        train_dataloaders=Listed(*[samples(5, kind)] * BATCHES),
        val_dataloaders=Listed(samples(6, kind)),
        ckpt_path=resume,
    )
    return trainer


# Pretraining


def phases(task: AbstractTask) -> list[str]:
    """Fills up with what the model does, call by call: train or val, and solve or unroll."""
    seen: list[str] = []

    def see(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Solution]) -> None:
        unrolled = output[1].status == Status.NOT_SOLVED
        assert unrolled.all() or not unrolled.any()
        seen.append(
            f"{'train' if module.training else 'val'} {'unroll' if unrolled.all() else 'solve'}"
        )

    task.model.register_forward_hook(see)
    return seen


def test_pretraining_ends_at_its_step_and_evaluations_always_solve(tmp_path):
    task = make_task()
    seen = phases(task)
    fit(task, tmp_path, Pretraining(steps=3), max_epochs=3)
    assert seen == [
        *("train unroll", "train unroll", "val solve"),
        *("train unroll", "train solve", "val solve"),
        *("train solve", "train solve", "val solve"),
    ]


def test_pretraining_counts_optimizer_steps_and_not_batches(tmp_path):
    task = make_task()
    seen = phases(task)
    fit(task, tmp_path, Pretraining(steps=1), max_epochs=2, accumulate_grad_batches=2)
    assert [call for call in seen if "train" in call] == ["train unroll"] * 2 + ["train solve"] * 2


def test_pretraining_unrolls_as_deep_as_it_says(tmp_path):
    trainer = fit(make_task(), tmp_path, Pretraining(steps=2, depth=7))
    metrics = metrics_of(trainer, "train")
    assert metrics["nfe"] == 7
    assert metrics["unconverged"] == 0


def test_without_pretraining_steps_every_step_solves(tmp_path):
    task = make_task()
    seen = phases(task)
    fit(task, tmp_path, Pretraining(steps=0))
    assert seen == ["train solve", "train solve", "val solve"]


def test_a_run_that_ends_in_pretraining_leaves_a_model_that_solves(tmp_path):
    task = make_task()
    fit(task, tmp_path, Pretraining(steps=100), limit_val_batches=0)
    _, solution = task.model(samples(5).inputs)
    assert (solution.status != Status.NOT_SOLVED).all()


def test_a_resumed_run_is_in_the_phase_of_its_step(tmp_path):
    trainer = fit(make_task(), tmp_path, Pretraining(steps=3))
    saved = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(saved)
    # Another task and callback, without the state of the two completed steps.
    task = make_task()
    seen = phases(task)
    fit(task, tmp_path, Pretraining(steps=3), max_epochs=2, resume=saved)
    assert seen == ["train unroll", "train solve", "val solve"]


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ({"steps": -1}, "steps is -1, but must be a whole number of at least 0"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"steps": True}, "steps is True"),
        ({"steps": 1, "depth": 0}, "depth is 0, but must be a whole number of at least 1"),
    ],
)
def test_pretraining_refuses_anything_but_counts(wrong, cure):
    with pytest.raises(ValueError, match=cure):
        Pretraining(**wrong)


# Timers


def test_the_timer_leaves_the_warm_up_out_of_its_median(tmp_path):
    timer = StepTimer()
    assert timer.median_ms is None
    assert timer.first_start is None
    fit(make_task(), tmp_path, timer, max_epochs=2)
    assert timer.median_ms is None  # four steps: all of them warm-up
    assert timer.first_start is not None
    first = timer.first_start
    fit(make_task(), tmp_path, timer, max_epochs=2)
    assert timer.first_start == first
    assert len(timer.seconds) == 3  # of eight, without the first five
    assert timer.median_ms == 1000 * sorted(timer.seconds)[1] > 0


def test_the_shares_of_the_training_time_come_from_every_20th_step_after_the_warm_up(tmp_path):
    task, timer = make_task(), StepTimer()
    cell, hooked = task.model.equilibrium.cell, set()
    cell.register_forward_pre_hook(
        lambda *_: hooked.add(task.global_step) if cell._forward_hooks else None
    )
    trained(task, [samples(5)] * 5, tmp_path, callbacks=[timer])
    assert timer.shares is None
    trained(task, [samples(5)] * 30, tmp_path, callbacks=[timer := StepTimer()])
    assert hooked == {5, 25}
    assert not cell._forward_hooks
    assert (shares := timer.shares) is not None
    assert list(shares) == ["f", "solver", "adjoint", "other"]
    assert min(shares.values()) > 0
    assert sum(shares.values()) == pytest.approx(1)


def test_time_that_passes_in_a_layer_is_counted_as_that_layers(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fastdeq.timer.time.perf_counter", lambda: now[0])
    for part, name in (("deq.cell", "f"), ("head", "other"), ("stem", "other")):
        task, timer = make_task(), StepTimer()
        layer = task.model.get_submodule(part)
        layer.register_forward_hook(lambda *_: now.append(now.pop() + 1.0))
        trained(task, [samples(5)] * 7, tmp_path, callbacks=[timer])
        shares = dict.fromkeys(("f", "solver", "adjoint", "other"), 0.0)
        assert timer.shares == {**shares, name: 1.0}, part


def test_the_timer_logs_steps_and_the_epochs_mean(tmp_path):
    logged = Kept()
    trainer = fit(make_task(), tmp_path, StepTimer(), logger=logged)
    steps = [row["step/seconds"] for row in logged.rows if "step/seconds" in row]
    assert len(steps) == BATCHES
    # Two float32 numbers and their mean.
    assert metrics_of(trainer, "train")["seconds"] == pytest.approx(sum(steps) / 2, rel=1e-6)


# Lines


class Kept(Logger):
    """Keeps in memory what a run logs."""

    name, version = "kept", 7

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        return

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def of_epoch(self, epoch: int) -> dict[str, float]:
        """The metrics of this epoch, train and val, whenever they were logged."""
        mine = [row for row in self.rows if row["epoch"] == epoch]
        return {name: value for row in mine for name, value in row.items()}


def first(epoch: str, left: str = "") -> str:
    """What stands before the metrics of a line."""
    return f"{epoch:9}{left:>9}"


@pytest.mark.parametrize("kind", [ClassificationTask, RegressionTask])
@pytest.mark.parametrize("left", ["", "10 min"])
def test_an_epochs_line_has_the_metrics_of_this_epoch_and_the_time_left(
    kind, left, tmp_path, lines, monkeypatch
):
    monkeypatch.setattr(console, "seconds_left", lambda *_: 600 if left else None)
    task, logged = make_task(kind, lr=0.1, skip=0.1), Kept()
    trainer = fit(task, tmp_path, StepTimer(), EpochLines(), logger=logged, max_epochs=3)
    table = table_of(trainer, task, "val", residual=True)
    metrics = [logged.of_epoch(epoch) for epoch in range(3)]
    for name in ("train/loss", "val/loss"):  # else a line of another epoch would look right
        assert len({epoch[name] for epoch in metrics}) == 3
    wanted = [row(table, first(f"{i}/3", left), epoch) for i, epoch in enumerate(metrics, start=1)]
    assert lines == [heading(table, first("epoch", "left")), *wanted]


def test_the_lines_stand_under_their_headings(tmp_path, lines):
    fit(make_task(lr=0.1), tmp_path, StepTimer(), EpochLines(), max_epochs=2)
    titles, names = lines[0].splitlines()
    assert len(titles) == len(names)
    assert all(len(line) == len(names) for line in lines[1:])  # with "ms" the last column is filled
    assert [line.split()[0] for line in lines[1:]] == ["1/2", "2/2"]


def test_an_epoch_without_validation_shows_no_metrics_of_an_earlier_one(
    tmp_path, lines, monkeypatch
):
    monkeypatch.setattr(console, "seconds_left", lambda *_: None)
    task, logged = make_task(lr=0.1), Kept()
    options: dict[str, Any] = {"check_val_every_n_epoch": 2, "logger": logged, "max_epochs": 3}
    trainer = fit(task, tmp_path, StepTimer(), EpochLines(), **options)
    table = table_of(trainer, task, "val", residual=True)
    metrics = [logged.of_epoch(epoch) for epoch in range(3)]
    assert ["val/loss" in epoch for epoch in metrics] == [False, True, False]
    wanted = [row(table, first(f"{i}/3"), each) for i, each in enumerate(metrics, start=1)]
    assert lines[1:] == wanted


def test_a_run_without_an_end_counts_its_epochs_alone(tmp_path, lines):
    fit(make_task(), tmp_path, EpochLines(), max_epochs=-1, max_steps=2 * BATCHES)
    assert [line.split()[0] for line in lines[1:]] == ["1", "2"]


# Checkpoints


class Scripted(ClassificationTask):
    """Its accuracies in evaluation follow a script, whatever the model says."""

    script: Iterator[float]

    def scores(self, prediction: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": torch.tensor(0.0 if self.model.training else next(self.script))}


class ScriptedLoss(RegressionTask):
    """Its losses in evaluation follow a script too."""

    script: Iterator[float]

    def criterion(self, prediction: Tensor, targets: Tensor) -> Tensor:
        loss = super().criterion(prediction, targets)
        return loss if self.model.training else torch.tensor(next(self.script))


@pytest.mark.parametrize(
    ("kind", "script"),
    [
        (Scripted, [0.25, 0.75, 0.5]),  # the largest accuracy
        (ScriptedLoss, [3.0, 1.0, 2.0]),  # the smallest loss
        (Scripted, [0.25, 0.75, 0.75]),  # of equals the first
    ],
)
def test_the_best_and_the_last_state_are_kept(
    kind: type[Scripted | ScriptedLoss], script: list[float], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    task = make_task(kind, lr=0.1)
    assert isinstance(task, kind)
    # An evaluation asks twice: for the prediction, and for the explicit one.
    task.script = (value for value in script for _ in range(2))
    kept = checkpoints(tmp_path / "kept", task)
    fit(task, tmp_path, *kept, enable_checkpointing=True, max_epochs=3)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [BEST, LAST]
    best, last = (torch.load(tmp_path / "kept" / name, weights_only=True) for name in (BEST, LAST))
    assert (best["epoch"], best["global_step"]) == (1, 2 * BATCHES)
    assert (last["epoch"], last["global_step"]) == (2, 3 * BATCHES)
    final = task.state_dict()
    assert all(torch.equal(value, final[name]) for name, value in last["state_dict"].items())
    assert not all(torch.equal(value, final[name]) for name, value in best["state_dict"].items())


# Lightning warns that there is nothing to monitor; so does the end of an experiment (_conclude).
@pytest.mark.filterwarnings("ignore:`ModelCheckpoint.monitor=")
def test_a_run_without_validation_keeps_the_last_state(tmp_path):
    task = make_task()
    kept = checkpoints(tmp_path / "kept", task)
    fit(task, tmp_path, *kept, enable_checkpointing=True, limit_val_batches=0)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [LAST]


# The bar


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (ClassificationTask, ["loss", "accuracy", "nfe", "residual"]),
        (RegressionTask, ["loss", "nfe", "residual"]),
    ],
)
def test_the_bar_shows_the_time_left_and_the_steps_metrics_as_far_as_they_fit(
    kind, shown, tmp_path, monkeypatch
):
    bar, task = ProgressBar(), make_task(kind)
    trainer = fit(task, tmp_path, StepTimer(), bar, enable_progress_bar=True, logger=Kept())
    metrics = bar.get_metrics(trainer, task)
    assert list(metrics) == ["left", *shown]
    assert {each: metrics[each] for each in shown} == {
        each: trainer.callback_metrics[f"step/{each}"].item() for each in shown
    }
    assert bar._get_train_description(0) == "epoch 1/1"  # as in the lines of epochs
    widths = {}
    for width in (120, 80, 50, 30):
        monkeypatch.setattr(console, "terminal_width", lambda width=width: width)
        widths[width] = list(bar.get_metrics(trainer, task))
    assert widths[120] == ["left", *shown]
    assert list(metrics)[: len(widths[50])] == widths[50]
    assert len(widths[80]) > len(widths[50]) > len(widths[30]) == 0
