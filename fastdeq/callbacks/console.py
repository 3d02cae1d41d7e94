"""L7: one plain line an epoch: readable on a terminal, in a log and in a pipe."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

_COLUMNS = (
    ("loss", "loss {:.4f}", 1),
    ("accuracy", "accuracy {:6.2f} %", 100),
    ("nfe", "NFE {:5.2f}", 1),
    ("residual", "residual {:.1e}", 1),
)


class EpochLines(Callback):
    """Prints loss, accuracy, NFE and residual of training and evaluation after each epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after the epoch's evaluation, when all its figures are known."""
        figures: dict[str, Any] = trainer.callback_metrics
        epochs = "?" if trainer.max_epochs in (None, -1) else str(trainer.max_epochs)
        epoch = str(trainer.current_epoch + 1).rjust(len(epochs))
        stages = (
            _line(stage, label, figures) for stage, label in (("train", "train"), ("val", "test"))
        )
        pl_module.print(f"epoch {epoch}/{epochs}  " + "  |  ".join(filter(None, stages)))


def _line(stage: str, label: str, figures: dict[str, Any]) -> str:
    found = [
        text.format(scale * float(figures[f"{stage}/{name}"]))
        for name, text, scale in _COLUMNS
        if f"{stage}/{name}" in figures
    ]
    return f"{label}: {'  '.join(found)}" if found else ""
