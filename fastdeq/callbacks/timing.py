"""L7: what a training step costs."""

import statistics
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from fastdeq.clock import now
from fastdeq.tasks import AbstractTask

_WARM_UP = 5  # steps that allocate and tune; not in the median


class StepTimer(Callback):
    """Seconds of each whole training step: forward, backward and optimizer, the device awaited.

    Logged as `step/seconds` and, as the epoch's mean, `train/seconds`.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._seen, self._start = 0, 0.0
        self._first: float | None = None

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds a step, after the warm-up; None before there is one."""
        return 1000 * statistics.median(self.seconds) if self.seconds else None

    @property
    def first_start(self) -> float | None:
        """When the first step began, in seconds of `time.perf_counter`; None before it has."""
        return self._first

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._start = now(pl_module.device)
        if self._first is None:
            self._first = self._start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it, once the device is done."""
        seconds = now(pl_module.device) - self._start
        self._seen += 1
        if self._seen > _WARM_UP:
            self.seconds.append(seconds)
        if isinstance(pl_module, AbstractTask):
            pl_module.record("train", {"seconds": seconds})
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set at run time
        if every and trainer.global_step % every == 0:  # 0: never
            pl_module.log("step/seconds", seconds, on_step=True, on_epoch=False)
