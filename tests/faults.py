"""What goes wrong in a run, to be put into one as a callback."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer


class FailingRank(Callback):
    """The second process fails in its second step; the first waits for its gradients."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            raise RuntimeError("the second fails")
