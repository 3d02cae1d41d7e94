"""The time of training steps."""

import statistics
import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from fastdeq.training.step import Seconds, StepResult

_WARM_UP = 5  # steps that allocate and tune; not in the median


class StepTimer(Callback):
    """Measures each optimizer step with the device's clock: forward and backward passes of its
    batches, and the optimizer. Only reading the results waits for the device.
    """

    def __init__(self) -> None:
        self._steps: list[Seconds] = []
        self._seen = 0
        self.first_start: float | None = None
        """`time.perf_counter` at the start of the first step; None before."""

    @property
    def seconds(self) -> list[float]:
        """Seconds of every step after the warm-up; waits for the device."""
        return [float(total) for total in self._steps]

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds per step after the warm-up; None without such steps."""
        return 1000 * statistics.median(self.seconds) if self._steps else None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the start of the first step."""
        if self.first_start is None:
            self.first_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the seconds of a completed step."""
        step: StepResult | None = outputs["step"]
        if step is None:
            return
        self._seen += 1
        if self._seen > _WARM_UP:
            self._steps.append(step.seconds)
