"""Training a finished run further."""

from pytorch_lightning import Callback, LightningModule, Trainer

from fastdeq.training.task import AbstractTask


class ExtendedSchedule(Callback):
    """Moves the learning rate of an extended run to the schedule of its new length: a schedule in
    shares of the run (`Cosine`, `Staircase`) is that of a run which had this length from the start,
    at the step that the run has reached. A scheduler of torch continues as it is.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move it, after the state of the run was restored."""
        assert isinstance(pl_module, AbstractTask)
        pl_module.extend_schedule()
