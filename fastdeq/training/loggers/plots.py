"""The plots of `fastdeq report plots` during training, for loggers that show images."""

import time
from pathlib import Path
from typing import Protocol, runtime_checkable

from pytorch_lightning import Callback, LightningModule, Trainer

from fastdeq.report.records import Record, read_record
from fastdeq.training.loggers.metrics_file import MetricsFile
from fastdeq.training.timing import StepTimer


@runtime_checkable
class ShowsPlots(Protocol):
    """A logger that shows images."""

    def log_plots(self, run: Record, step: int) -> None:
        """Draw the run and show the plots; without matplotlib, nothing."""


class LoggerPlots(Callback):
    """Lets loggers draw the run from its folder: after an epoch, at most once per `seconds`, and
    after the test.
    """

    def __init__(self, seconds: float = 60) -> None:
        self.seconds = seconds
        self._drawn = -float("inf")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the epochs before this one have written."""
        if trainer.current_epoch and time.monotonic() - self._drawn >= self.seconds:
            self._draw(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the whole run."""
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.flush()
        run = _record(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, ShowsPlots):
                logger.log_plots(run, trainer.global_step)
        self._drawn = time.monotonic()


def _record(trainer: Trainer) -> Record:
    """The run so far, with the shares of time, which its folder does not have yet."""
    record, _ = read_record(Path(trainer.default_root_dir))
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # run time
    timers = [each for each in callbacks if isinstance(each, StepTimer)]
    return record.with_shares(timers[0].shares if timers else None)
