"""What a training step costs."""

import statistics
import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from fastdeq.training.step import Seconds, StepResult

_WARM_UP = 5  # steps that allocate and tune; not in the median


class StepTimer(Callback):
    """The seconds of each whole optimizer step: forward and backward passes of its batches, and the
    optimizer, by the device's clock. The device is waited for only when they are read.
    """

    def __init__(self) -> None:
        self._steps: list[Seconds] = []
        self._seen = 0
        self.first_start: float | None = None
        """When the first step began, in seconds of `time.perf_counter`; None before it has."""

    @property
    def seconds(self) -> list[float]:
        """Of every step after the warm-up; waits for the device."""
        return [float(total) for total in self._steps]

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds per step, after the warm-up; None before there is one."""
        return 1000 * statistics.median(self.seconds) if self._steps else None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note when the first step begins."""
        if self.first_start is None:
            self.first_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the seconds of a completed step."""
        step: StepResult | None = outputs["step"]
        if step is None:
            return
        self._seen += 1
        if self._seen > _WARM_UP:
            self._steps.append(step.seconds)
