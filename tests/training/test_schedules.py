"""Learning rates, step by step."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from fastdeq.training import (
    AbstractSchedule,
    ClassificationTask,
    Constant,
    Cosine,
    LRSchedulerConfig,
    RegressionTask,
    Staircase,
)
from fastdeq.training.loss import LossWeights
from tests.training.tasks import Listed, make_trainer, network, samples, take_step_settings

LR = 0.5


def rates(schedule: AbstractSchedule, steps: int) -> list[float]:
    """The learning rates of the optimizer's steps, and the one that is left after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = schedule.build(optimizer, steps)
    seen = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_constant_is_the_optimizers_own_rate():
    assert rates(Constant(), 5) == [LR] * 6


def test_cosine_falls_by_half_a_cosine_to_the_minimum():
    steps, minimum = 8, 0.1
    formula = [
        minimum + (LR - minimum) * (1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps + 1)
    ]
    # Torch multiplies from step to step: a few roundings of 1e-16.
    assert rates(Cosine(minimum=minimum), steps) == pytest.approx(formula, rel=1e-12)
    assert formula[0] == LR
    assert formula[-1] == minimum
    # A tenth of a thousandth of the first rate: what is left where the cosine ends at zero.
    assert rates(Cosine(), steps)[-1] == pytest.approx(0, abs=1e-4 * LR)


def test_the_staircase_falls_after_each_share_of_the_run():
    assert rates(Staircase(at=[0.5]), 4) == pytest.approx([LR] * 2 + [LR / 10] * 3)
    found = rates(Staircase(at=[0.25, 0.75], factor=0.5), 8)
    assert found == [LR] * 2 + [LR / 2] * 4 + [LR / 4] * 3


def test_shares_that_meet_in_one_step_of_a_short_run_lower_the_rate_as_often():
    found = rates(Staircase(at=[0.5, 0.6], factor=0.5), 2)
    assert found == [LR, LR / 4, LR / 4]


class Rates(Callback):
    """Keeps the learning rate of every batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def rates_of_a_run(schedule: Any, folder: Path, **options: Any) -> list[float]:
    """The learning rates of the batches of a run with four batches an epoch."""
    task = ClassificationTask(
        model=network("zeros"),
        optimizer=partial(torch.optim.SGD, lr=LR),
        weights=LossWeights(),
        schedule=schedule,
    )
    take_step_settings(task, options)
    seen = Rates()
    trainer = make_trainer(folder, callbacks=[seen], limit_val_batches=0, **options)
    loader = Listed(*[samples(3)] * 4)
    trainer.fit(task, train_dataloaders=loader, val_dataloaders=loader)
    return seen.seen


def test_in_a_run_the_shares_are_of_its_optimizer_steps(tmp_path):
    run = partial(rates_of_a_run, Staircase(at=[0.5], factor=0.5), tmp_path)
    assert run(max_epochs=2) == [LR] * 4 + [LR / 2] * 4
    assert run(max_epochs=9, max_steps=2) == [LR, LR / 2]
    # Two batches make a step, so that two epochs have four.
    assert run(max_epochs=2, accumulate_grad_batches=2) == [LR] * 4 + [LR / 2] * 4
    # A limit between the number of steps and that of batches.
    options = {"max_steps": 7, "accumulate_grad_batches": 2}
    assert run(max_epochs=2, **options) == [LR] * 4 + [LR / 2] * 4


def test_in_a_run_the_cosine_moves_at_every_step(tmp_path):
    found = rates_of_a_run(Cosine(minimum=0.1), tmp_path, max_epochs=2)
    assert found == rates(Cosine(minimum=0.1), 8)[:-1]


def test_a_run_without_a_schedule_keeps_its_rate(tmp_path):
    assert rates_of_a_run(None, tmp_path) == [LR] * 4


@pytest.mark.parametrize(
    ("schedule", "wrong", "cure"),
    [
        (Cosine, {"minimum": -1e-3}, "at least 0"),
        (Staircase, {"at": [0.5], "factor": 0}, "above 0"),
        (Staircase, {"at": [0.5, 1.5]}, r"must hold shares of the run: \[0\.5\]"),
        (Staircase, {"at": [0]}, r"\[0\.5\]"),
        (Staircase, {"at": ["half"]}, "must be a list, each a number"),
        (Staircase, {"at": [True]}, "must be a list, each a number"),
        (Staircase, {"at": 0.5}, "must be a list, each a number"),  # the brackets forgotten
        (Staircase, {"at": "0.5"}, "must be a list, each a number"),
        (Staircase, {"at": None}, "must be a list, each a number"),
        (Staircase, {"at": [0.7, 0.5]}, "must ascend"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_is_meant(schedule, wrong, cure):
    with pytest.raises((TypeError, ValueError), match=cure):
        schedule(**wrong)


# Torch's schedulers


def test_a_scheduler_of_torch_moves_at_every_epoch_or_as_it_is_configured(tmp_path):
    falling = partial(StepLR, step_size=1, gamma=0.5)
    run = partial(rates_of_a_run, folder=tmp_path, max_epochs=3)
    halves = [LR, LR / 2, LR / 4]
    each_epoch = [rate for rate in halves for _ in range(4)]
    assert run(falling) == run(LRSchedulerConfig(scheduler=falling)) == each_epoch
    every_second = LRSchedulerConfig(scheduler=falling, frequency=2)
    assert run(every_second) == [LR] * 8 + [LR / 2] * 4
    steps = LRSchedulerConfig(scheduler=falling, interval="step")
    assert run(steps) == [LR / 2**k for k in range(12)]
    assert run(steps, accumulate_grad_batches=2) == [LR / 2 ** (k // 2) for k in range(12)]


def test_one_cycle_is_torchs_own_over_the_steps_of_a_run(tmp_path):
    cycle = partial(OneCycleLR, max_lr=1.0, total_steps=8)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = cycle(optimizer)
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    config = LRSchedulerConfig(scheduler=cycle, interval="step")
    assert rates_of_a_run(config, tmp_path, max_epochs=2) == expected


class EpochRates(Callback):
    """The rate with which each epoch ends, and what the metric was then."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.seen: list[tuple[float, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch:
            metric = float(trainer.callback_metrics[self.metric])
            self.seen.append((metric, trainer.optimizers[0].param_groups[0]["lr"]))


@pytest.mark.parametrize(
    ("kind", "monitor", "mode"),
    [
        (ClassificationTask, None, "max"),  # the task's own: val/accuracy
        (ClassificationTask, "val/loss", "min"),
        (ClassificationTask, "train/accuracy", "max"),
        (ClassificationTask, "train/loss", "min"),
        (RegressionTask, None, "min"),  # val/loss
    ],
)
def test_a_plateau_follows_its_metric_in_the_direction_that_is_better(
    tmp_path, kind, monitor, mode
):
    """Against torch's own scheduler, given the metrics that were logged."""
    task = kind(
        model=network("zeros"),
        optimizer=partial(torch.optim.SGD, lr=0.5),
        weights=LossWeights(),
        schedule=LRSchedulerConfig(
            scheduler=partial(ReduceLROnPlateau, patience=0, factor=0.5), monitor=monitor
        ),
    )
    seen = EpochRates(monitor or f"val/{kind.monitor[0]}")
    trainer = make_trainer(tmp_path, callbacks=[seen], max_epochs=9)
    trainer.fit(task, Listed(samples(20, kind)), Listed(samples(21, kind)))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    expected = ReduceLROnPlateau(optimizer, mode=mode, patience=0, factor=0.5)
    for metric, rate in seen.seen:
        expected.step(metric)
        assert rate == optimizer.param_groups[0]["lr"]
    other = ReduceLROnPlateau(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5),
        mode="min" if mode == "max" else "max",
        patience=0,
        factor=0.5,
    )
    for metric, _ in seen.seen:
        other.step(metric)
    assert len(seen.seen) == 8
    assert other.get_last_lr() != expected.get_last_lr()  # or this test could not tell them apart


def test_a_mode_that_is_given_is_kept():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    config = LRSchedulerConfig(scheduler=partial(ReduceLROnPlateau, mode="min"))
    for schedule, mode in (
        (config, "min"),
        (LRSchedulerConfig(scheduler=ReduceLROnPlateau), "max"),
    ):
        scheduler: Any = schedule.following("val/accuracy").build(optimizer, 1)
        assert scheduler.mode == mode


def test_a_scheduler_that_is_built_already_and_a_plateau_of_steps_are_refused():
    built: Any = StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR), step_size=1)
    with pytest.raises(TypeError, match="_partial_: true"):
        LRSchedulerConfig(scheduler=built)
    with pytest.raises(ValueError, match="use interval=epoch"):
        LRSchedulerConfig(scheduler=ReduceLROnPlateau, interval="step")
