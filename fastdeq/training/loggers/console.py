"""The console output of training: one line per epoch, and a progress bar on a terminal."""

import logging

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar

from fastdeq.report.columns import Group, groups, heading, row
from fastdeq.training.regression import RegressionTask
from fastdeq.training.task import AbstractTask

log = logging.getLogger("fastdeq")

_BAR = ("loss", "accuracy", "nfe", "residual")


class EpochLines(Callback):
    """Logs one line per epoch with the metrics of training and evaluation."""

    def __init__(self) -> None:
        self._finished: int | None = None  # the epoch whose line is not printed yet
        self._validated: int | None = None  # the epoch of the last validation

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the headings."""
        if trainer.is_global_zero:
            log.info("%s", heading(table_of(trainer, pl_module, "val", residual=True), "epoch"))

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

    def _print(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._finished is None or not trainer.is_global_zero:
            return
        last, epoch = trainer.max_epochs, self._finished + 1
        name = f"{epoch}" if last in (None, -1) else f"{epoch}/{last}"
        metrics = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if self._validated == self._finished or not key.startswith("val/")
        }
        table = table_of(trainer, pl_module, "val", residual=True)
        log.info("%s", row(table, name, metrics))
        self._finished = None


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
    """Lightning's rich bar with loss, accuracy, NFE and residual of the step."""

    def __init__(self) -> None:
        super().__init__(leave=False)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The metrics of the step, without the prefix."""
        metrics = trainer.callback_metrics
        return {name: float(metrics[f"step/{name}"]) for name in _BAR if f"step/{name}" in metrics}
