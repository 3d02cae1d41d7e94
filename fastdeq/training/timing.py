"""What a training step costs."""

import statistics
import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from fastdeq.timer import Stopwatch
from fastdeq.training.steps import completes_step
from fastdeq.training.task import AbstractTask

_WARM_UP = 5  # steps that allocate and tune; not in the median


class StepTimer(Callback):
    """Seconds of each whole optimizer step: forward and backward of its batches, and the optimizer,
    by the device's clock.

    Logged with the other figures of a step as `step/seconds` and, as the epoch's mean, as
    `train/seconds`. The device is not waited for, but where its figures are logged.
    """

    def __init__(self) -> None:
        self._watch: Stopwatch | None = None
        self._batches: list[Stopwatch] = []  # of the step under way
        self._stopped: list[_Total] = []
        self._seen = 0
        self._first: float | None = None

    @property
    def seconds(self) -> list[float]:
        """Of every step after the warm-up; waits for the device."""
        return [float(total) for total in self._stopped]

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds a step, after the warm-up; None before there is one."""
        return 1000 * statistics.median(self.seconds) if self._stopped else None

    @property
    def first_start(self) -> float | None:
        """When the first step began, in seconds of `time.perf_counter`; None before it has."""
        return self._first

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is left of a step that another training did not complete."""
        self._batches = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        if self._first is None:
            self._first = time.perf_counter()
        self._watch = Stopwatch(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it, and log a step that is complete."""
        assert self._watch is not None
        self._batches.append(self._watch.stop())
        if not completes_step(trainer):
            return
        total, self._batches = _Total(self._batches), []
        self._seen += 1
        if self._seen > _WARM_UP:
            self._stopped.append(total)
        if isinstance(pl_module, AbstractTask):
            pl_module.record("train", {"seconds": total})
            pl_module.log_step(total)


class _Total:
    """The sum of what stopwatches have measured, which are read when it is."""

    def __init__(self, watches: list[Stopwatch]) -> None:
        self._watches = watches

    def __float__(self) -> float:
        return sum(watch.seconds for watch in self._watches)
