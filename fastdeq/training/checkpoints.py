"""The checkpoints that a run keeps."""

from pathlib import Path

from pytorch_lightning.callbacks import ModelCheckpoint

from fastdeq.runs.folder import BEST, LAST
from fastdeq.training.task import AbstractTask


def checkpoints(folder: Path, task: AbstractTask) -> list[ModelCheckpoint]:
    """Callbacks that keep the states of the last epoch and of the best validation in `folder`.

    If the test set is the validation set (the protocol of the published tables), best.ckpt has been
    selected on the test set: report last.ckpt.
    """
    metric, direction = task.monitor
    last = ModelCheckpoint(
        dirpath=folder,
        filename=Path(LAST).stem,
        enable_version_counter=False,
        save_on_train_epoch_end=True,  # after the evaluation, whatever its metrics are
    )
    best = ModelCheckpoint(
        dirpath=folder,
        filename=Path(BEST).stem,
        monitor=f"val/{metric}",
        mode=direction,
        enable_version_counter=False,
        auto_insert_metric_name=False,
    )
    return [best, last]
