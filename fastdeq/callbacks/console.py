"""L7: one plain line an epoch: readable on a terminal, in a log and in a pipe."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

# name, heading, format, width
_COLUMNS = (
    ("loss", "loss", "{:.4f}", 9),
    ("accuracy", "accuracy", "{:.2%}", 10),
    ("nfe", "NFE", "{:.2f}", 7),
    ("residual", "residual", "{:.1e}", 10),
)
_STAGES = (("train", "train"), ("val", "test"))  # the set evaluated every epoch is the test set


class EpochLines(Callback):
    """Prints loss, accuracy, NFE and residual of training and evaluation, a line an epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The headings."""
        width = sum(width for *_, width in _COLUMNS)
        titles = "".join(f"   {title + ' ':─<{width}}" for _, title in _STAGES)
        names = "".join(f"{heading:>{width}}" for _, heading, _, width in _COLUMNS)
        pl_module.print(f"{'':7}{titles}\n{'epoch':>7}" + f"   {names}" * len(_STAGES))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The line: this hook runs after the epoch's evaluation, when all figures are known."""
        epoch = f"{trainer.current_epoch + 1}/{trainer.max_epochs}"
        cells = "".join(f"   {_cells(stage, trainer.callback_metrics)}" for stage, _ in _STAGES)
        pl_module.print(f"{epoch:>7}{cells}")


def _cells(stage: str, figures: dict[str, Any]) -> str:
    texts = []
    for name, _, text, width in _COLUMNS:
        figure = figures.get(f"{stage}/{name}")
        shown = "" if figure is None else text.format(float(figure))
        texts.append(f"{shown:>{width}}")
    return "".join(texts)
