"""L7: what a training step costs."""

import statistics
import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

_WARM_UP = 5  # steps that allocate and tune; not counted


class StepTimer(Callback):
    """Seconds of each whole training step: forward, backward and optimizer, the device awaited."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._seen, self._start = 0, 0.0

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds a step, after the warm-up; None before there is one."""
        return 1000 * statistics.median(self.seconds) if self.seconds else None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._start = _now(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it, once the device is done."""
        self._seen += 1
        if self._seen > _WARM_UP:
            self.seconds.append(_now(pl_module.device) - self._start)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # else only the queueing would be timed
    return time.perf_counter()
