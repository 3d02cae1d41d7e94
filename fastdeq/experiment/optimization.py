"""Checks that optimizer and scheduler work with the trainer's settings, before a run is made."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fastdeq.experiment.explain import nearest
from fastdeq.training import AbstractTask, LRSchedulerConfig
from fastdeq.training.task import METRICS, OptimizerFactory


def check_optimizer(make: OptimizerFactory, trainer: Mapping[str, Any], ranks: int) -> None:
    """Refuse settings that do not work with an optimizer that evaluates the loss several times per
    step (LBFGS).

    With accumulated gradients its later evaluations would use the last batch only, its line search
    uses the loss of one process, and a gradient scaler takes gradients once per step (Lightning
    246).

    Raises: ValueError.
    """
    cures = {
        "trainer.accumulate_grad_batches=1": _accumulates(trainer),
        "one device (trainer.devices=1)": ranks > 1,
        "another trainer.precision than 16-mixed": trainer.get("precision") in ("16-mixed", "16"),
    }
    needed = [cure for cure, applies in cures.items() if applies]
    if needed and evaluations_per_step(make) > 1:
        raise ValueError(
            "this optimizer evaluates the loss several times in a step, which needs "
            f"{' and '.join(needed)}: set that, or choose another optimizer"
        )


def evaluations_per_step(make: OptimizerFactory) -> int:
    """The number of closure calls in the optimizer's first step on a quadratic function."""
    weights = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    curvatures = torch.tensor([1.0, 4.0, 9.0])
    count = 0

    def loss() -> Tensor:
        nonlocal count
        count += 1
        weights.grad = (curvatures * weights).detach()
        return 0.5 * (curvatures * weights.detach().square()).sum()

    make([weights]).step(loss)  # type: ignore[arg-type]  # torch takes closures that return tensors
    return count


def check_scheduler(task: AbstractTask, trainer: Mapping[str, Any]) -> None:
    """Build the task's scheduler, and check that the metric it follows is logged.

    Raises: ValueError, TypeError.
    """
    schedule = task.schedule
    scheduler = schedule.build(task.make_optimizer(task.parameters()), 1)
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"{scheduler!r} is not a scheduler of torch: use one, or a class of its kind"
        )
    if isinstance(schedule, LRSchedulerConfig) and schedule.monitor and schedule.is_plateau:
        _check_monitor(schedule.monitor, schedule.frequency, trainer)


def _check_monitor(monitor: str, frequency: int, trainer: Mapping[str, Any]) -> None:
    stage, _, metric = monitor.partition("/")
    if stage in ("train", "val") and metric not in METRICS:
        near = nearest(monitor, [f"{stage}/{name}" for name in METRICS])
        raise ValueError(f"there is no metric '{monitor}' to monitor{near}")
    if stage != "val":
        return
    if trainer.get("limit_val_batches") == 0:
        raise ValueError(
            f"{monitor} is never there to monitor, for trainer.limit_val_batches is 0: set it, or "
            "monitor train/loss"
        )
    every = trainer.get("check_val_every_n_epoch", 1)
    if every is None or frequency % every:
        raise ValueError(
            f"{monitor} does not come every {frequency} epochs, for "
            f"trainer.check_val_every_n_epoch is {every}: set both to the same number "
            "(scheduler=plateau scheduler.frequency=N)"
        )


def _accumulates(trainer: Mapping[str, Any]) -> bool:
    return bool(trainer.get("accumulate_grad_batches", 1) != 1)
