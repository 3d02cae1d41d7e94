"""Learning rates, step by step."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from fastdeq.tasks import AbstractSchedule, ClassificationTask, Constant, Cosine, Staircase
from fastdeq.tasks.objective import LossWeights
from tests.test_tasks import Listed, make_trainer, network, samples

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


def rates_of_a_run(schedule: AbstractSchedule | None, folder: Path, **options: Any) -> list[float]:
    """The learning rates of the batches of a run with four batches an epoch."""
    task = ClassificationTask(
        model=network("zeros"),
        optimizer=partial(torch.optim.SGD, lr=LR),
        weights=LossWeights(),
        schedule=schedule,
    )
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
        (Staircase, {"at": ["half"]}, r"\[0\.5\]"),
        (Staircase, {"at": [True]}, r"\[0\.5\]"),
        (Staircase, {"at": 0.5}, r"\[0\.5\]"),  # the brackets forgotten
        (Staircase, {"at": "0.5"}, r"\[0\.5\]"),
        (Staircase, {"at": None}, r"\[0\.5\]"),
        (Staircase, {"at": [0.7, 0.5]}, "must ascend"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_is_meant(schedule, wrong, cure):
    with pytest.raises(ValueError, match=cure):
        schedule(**wrong)
