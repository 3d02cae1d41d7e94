"""The console output of training: lines of epochs and of progress, and a bar on a terminal."""

import math
import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
)
from rich.progress import ProgressColumn, TextColumn

from fastdeq.report.columns import FIRST, Group, duration, fit, groups, heading, row
from fastdeq.runs.log import log_fitted
from fastdeq.streams import terminal_width
from fastdeq.training.metrics import mean_metrics
from fastdeq.training.regression import RegressionTask
from fastdeq.training.step import StepResult
from fastdeq.training.task import AbstractTask
from fastdeq.training.timing import seconds_left, steps_of_run

_BAR = ("loss", "accuracy", "nfe", "residual")
_BAR_WIDTH = 12
_LEFT = 9  # width of the column with the time that is left


class EpochLines(Callback):
    """Logs one line per epoch with the metrics of training and evaluation, and the time that is
    left of the run. A terminal shows the columns that fit its width.

    minutes: between two lines within an epoch, with step, loss and NFE of the last step; None: no
        such lines. Where a progress bar shows the same, they are in the log file alone.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.minutes = minutes
        self._finished: int | None = None  # the epoch whose line is not printed yet
        self._validated: int | None = None  # the epoch of the last validation
        self._table: tuple[Group, ...] = ()
        self._fitted: tuple[Group, ...] | None = None  # chosen with the headings
        self._printed = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the headings."""
        self._table, self._fitted = table_of(trainer, pl_module, "val", residual=True), None
        self._printed = time.monotonic()
        if trainer.is_global_zero:
            first = f"{'epoch':{FIRST}}{'left':>{_LEFT}}"
            log_fitted(heading(self._table, first), lambda width: heading(self._fit(width), first))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch: the trainer keeps its metrics until the next validation."""
        self._validated = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch: the module logs its training metrics after this hook."""
        self._finished = trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the previous epoch."""
        self._print(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the last epoch."""
        self._print(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line of progress, if one is due."""
        step: StepResult | None = outputs["step"]
        if self.minutes is None or step is None or not trainer.is_global_zero:
            return
        if time.monotonic() - self._printed >= 60 * self.minutes:
            self._print_progress(trainer, pl_module, step)

    def _print(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._finished is None or not trainer.is_global_zero:
            return
        name = self._name(trainer, pl_module, self._finished)
        metrics = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if self._validated == self._finished or not key.startswith("val/")
        }
        log_fitted(
            row(self._table, name, metrics), lambda width: row(self._fit(width), name, metrics)
        )
        self._finished, self._printed = None, time.monotonic()

    def _print_progress(
        self, trainer: Trainer, pl_module: LightningModule, step: StepResult
    ) -> None:
        assert isinstance(pl_module, AbstractTask)
        batches = [(each.metrics, each.samples) for each in step.batches if each.samples]
        metrics, steps = mean_metrics(batches), steps_of_run(trainer, pl_module)
        of_all = f" of {steps:,.0f}" if math.isfinite(steps) else ""
        parts = [f"step {trainer.global_step:,}{of_all}"]
        for key, text in (("loss", "loss {:.4g}"), ("nfe", "NFE {:.2f}")):
            parts += [text.format(metrics[key])] if key in metrics else []
        line = f"{self._name(trainer, pl_module, step.epoch)}  {', '.join(parts)}"
        has_bar = trainer.progress_bar_callback is not None
        log_fitted(line, lambda _: None if has_bar else line)
        self._printed = time.monotonic()

    def _name(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> str:
        """The number of the epoch, from 1, and the time that is left."""
        assert isinstance(pl_module, AbstractTask)
        left = seconds_left(trainer, pl_module)
        text = "" if left is None else duration(left)
        return f"{_count(trainer, epoch):{FIRST}}{text:>{_LEFT}}"

    def _fit(self, width: int) -> tuple[Group, ...]:
        """The columns for a terminal; they stay those of the headings."""
        if self._fitted is None:
            self._fitted = fit(self._table, width - FIRST - _LEFT)
        return self._fitted


def _count(trainer: Trainer, epoch: int) -> str:
    """The number of an epoch, from 1, and how many there are."""
    last = trainer.max_epochs
    return f"{epoch + 1}" if last in (None, -1) else f"{epoch + 1}/{last}"


def table_of(
    trainer: Trainer, pl_module: LightningModule, evaluated: str, *, residual: bool = False
) -> tuple[Group, ...]:
    """The columns that this task and model have. residual: also the one of training."""
    assert isinstance(pl_module, AbstractTask)
    data = getattr(trainer, "datamodule", None)
    on_test = evaluated == "test" or getattr(data, "validates_on_test", True)
    regression = isinstance(pl_module, RegressionTask)
    return groups(
        evaluated,
        "test" if on_test else "validation",
        accuracy=not regression,
        explicit=pl_module.model.predicts,
        loss="{:.2e}" if regression else "{:.4f}",
        residual=residual,
    )


class ProgressBar(RichProgressBar):
    """Lightning's rich bar in one line: epoch, batches, the time that is left of the run, and the
    metrics of the step, as many as fit.
    """

    def __init__(self) -> None:
        super().__init__(leave=False)

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """The epoch, a bar and the batches; Lightning adds the metrics."""
        return [
            TextColumn("{task.description}"),
            CustomBarColumn(bar_width=_BAR_WIDTH),
            BatchesProcessedColumn(style="default"),
        ]

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The time that is left, and the metrics of the step without the prefix."""
        assert isinstance(pl_module, AbstractTask)
        shown: dict[str, int | str | float | dict[str, float]] = {}
        if (left := seconds_left(trainer, pl_module)) is not None:
            shown["left"] = duration(left)
        metrics = trainer.callback_metrics
        shown |= {
            name: float(metrics[f"step/{name}"]) for name in _BAR if f"step/{name}" in metrics
        }
        used = len(self._get_train_description(trainer.current_epoch)) + _BAR_WIDTH
        free = (terminal_width() or 1000) - used - 2 * len(str(trainer.num_training_batches)) - 4
        while shown and sum(len(_bar_text(*each)) + 1 for each in shown.items()) > free:
            shown.popitem()
        return shown

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {_count(self.trainer, current_epoch)}"


def _bar_text(name: str, value: Any) -> str:
    """A metric as Lightning writes it."""
    return f"{name}: {value if isinstance(value, str) else f'{value:.3f}'}"
