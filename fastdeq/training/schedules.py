"""Learning rate schedules: settings that build torch's schedulers.

Lengths are shares of the run, so that a shorter run keeps the shape of a published schedule.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LRScheduler,
    MultiStepLR,
    ReduceLROnPlateau,
)

from fastdeq.settings import setting, settings

SchedulerFactory: TypeAlias = Callable[..., LRScheduler]
"""Takes the optimizer, returns a scheduler: a partial of one of torch's classes."""


class AbstractSchedule(ABC):
    """Builds a scheduler, by default one that is stepped after every optimizer step.

    interval, frequency: it is stepped after every `frequency`-th epoch or optimizer step.
    monitor: the metric that it follows, such as "val/loss"; None: the one that the task monitors.
    """

    interval: Literal["epoch", "step"] = "step"
    frequency: int = 1
    monitor: str | None = None

    @abstractmethod
    def build(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """The scheduler of a run of `steps` optimizer steps."""

    def following(self, monitor: str) -> "AbstractSchedule":
        """This schedule, with `monitor` as the metric that it follows by default."""
        return self

    def extend(self, scheduler: LRScheduler, steps: int) -> None:
        """Move a scheduler of a shorter run to where the schedule of a run of `steps` optimizer
        steps is after as many steps, with the learning rates.
        """
        groups = scheduler.optimizer.param_groups
        rates = [{"params": [Parameter(torch.zeros(()))], "lr": g["initial_lr"]} for g in groups]
        optimizer = SGD(rates)
        fresh = self.build(optimizer, steps)
        optimizer.step()  # torch warns if a scheduler is stepped first
        for _ in range(scheduler.last_epoch):
            fresh.step()
        scheduler.load_state_dict(fresh.state_dict())
        for group, moved in zip(groups, optimizer.param_groups, strict=True):
            group["lr"] = moved["lr"]

    def is_due(self, interval: str, number: int) -> bool:
        """Whether the scheduler is stepped after the number-th epoch or step (from 1)."""
        return interval == self.interval and number % self.frequency == 0


@settings
class Constant(AbstractSchedule):
    """A constant learning rate, that of the optimizer."""

    def build(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        return MultiStepLR(optimizer, milestones=[])


@settings
class Cosine(AbstractSchedule):
    """Half a cosine from the optimizer's learning rate down to `minimum` at the last step
    (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts).
    """

    minimum: float = setting(default=0.0, at_least=0)

    def build(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        return CosineAnnealingLR(optimizer, T_max=steps, eta_min=self.minimum)


@settings
class Staircase(AbstractSchedule):
    """The learning rate times `factor` after each share of the run that is listed in `at`.

    Raises: TypeError for anything but a list of numbers; ValueError for shares that do not lie
    between 0 and 1 or do not ascend.
    """

    at: list[float] = setting()
    factor: float = setting(default=0.1, above=0)

    def validate(self) -> None:
        if not all(0 < share < 1 for share in self.at):
            raise ValueError(f"Staircase.at is {self.at}, but must hold shares of the run: [0.5]")
        if list(self.at) != sorted(self.at):
            raise ValueError(f"Staircase.at is {self.at}, but must ascend")

    def build(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        milestones = [round(share * steps) for share in self.at]
        return MultiStepLR(optimizer, milestones=milestones, gamma=self.factor)


@settings
class LRSchedulerConfig(AbstractSchedule):
    """Any scheduler of torch, with the keys of Lightning's `lr_scheduler_config`.

    scheduler: takes the optimizer, returns the scheduler.
    interval, frequency, monitor: as in `AbstractSchedule`. ReduceLROnPlateau follows the metric;
        its mode is "max" for an accuracy, unless it is given.

    Raises: TypeError for a scheduler that is built already; ValueError for ReduceLROnPlateau with
        interval="step".
    """

    scheduler: SchedulerFactory
    interval: Literal["epoch", "step"] = "epoch"
    frequency: int = setting(default=1, at_least=1)
    monitor: str | None = None

    def validate(self) -> None:
        if not callable(self.scheduler):
            raise TypeError(
                f"the scheduler is {self.scheduler!r}, but must take the optimizer: give its "
                "_target_ with _partial_: true"
            )
        if self.is_plateau and self.interval == "step":
            raise ValueError(
                "ReduceLROnPlateau compares the metrics of epochs: use interval=epoch, with "
                "frequency=N for every N-th"
            )

    @property
    def is_plateau(self) -> bool:
        """Whether it follows a metric."""
        made = getattr(self.scheduler, "func", self.scheduler)
        return isinstance(made, type) and issubclass(made, ReduceLROnPlateau)

    def build(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        options = {}
        given = getattr(self.scheduler, "keywords", {})
        if self.is_plateau and "mode" not in given and "accuracy" in (self.monitor or ""):
            options["mode"] = "max"
        return self.scheduler(optimizer, **options)

    def extend(self, scheduler: LRScheduler, steps: int) -> None:
        """A scheduler of torch knows its length itself, or has none: it continues as it is."""

    def following(self, monitor: str) -> AbstractSchedule:
        return replace(self, monitor=self.monitor or monitor) if self.is_plateau else self


def as_schedule(given: AbstractSchedule | SchedulerFactory | None) -> AbstractSchedule:
    """Return a schedule unchanged; wrap a scheduler factory in a default `LRSchedulerConfig`."""
    if given is None:
        return Constant()
    return given if isinstance(given, AbstractSchedule) else LRSchedulerConfig(scheduler=given)
