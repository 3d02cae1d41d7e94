"""L7: what a training step costs."""

import statistics
import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from fastdeq.clock import Stopwatch
from fastdeq.tasks import AbstractTask

_WARM_UP = 5  # steps that allocate and tune; not in the median


class StepTimer(Callback):
    """Seconds of each whole training step: forward, backward and optimizer, by the device's clock.

    Logged with the other figures of a step as `step/seconds` and, as the epoch's mean, as
    `train/seconds`. The device is not waited for, but where its figures are logged.
    """

    def __init__(self) -> None:
        self._watch: Stopwatch | None = None
        self._stopped: list[Stopwatch] = []
        self._seen = 0
        self._first: float | None = None

    @property
    def seconds(self) -> list[float]:
        """Of every step after the warm-up; waits for the device."""
        return [watch.seconds for watch in self._stopped]

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds a step, after the warm-up; None before there is one."""
        return 1000 * statistics.median(self.seconds) if self._stopped else None

    @property
    def first_start(self) -> float | None:
        """When the first step began, in seconds of `time.perf_counter`; None before it has."""
        return self._first

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
        """Stop it."""
        assert self._watch is not None
        watch = self._watch.stop()
        self._seen += 1
        if self._seen > _WARM_UP:
            self._stopped.append(watch)
        if isinstance(pl_module, AbstractTask):
            pl_module.record("train", {"seconds": watch})
            pl_module.log_step(watch)
