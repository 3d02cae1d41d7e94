"""The first steps of a run without a solver."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer


class Pretraining(Callback):
    """Unroll the cell `depth` times from z₀, with ordinary backpropagation, in the first `steps`
    optimizer steps; from then on, and in every evaluation, solve (Bai et al. 2020, arXiv
    2006.08656, §4). Depends on the step alone, so a resumed run is in the right phase.

    Raises: ValueError for steps below 0 or a depth below 1.
    """

    def __init__(self, *, steps: int, depth: int = 5) -> None:
        for name, value, least in (("steps", steps, 0), ("depth", depth, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"Pretraining.{name} is {value!r}, but must be a whole number of at least "
                    f"{least}"
                )
        self.steps, self.depth = steps, depth

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose the phase by the optimizer steps made so far."""
        _equilibrium(pl_module).depth = self.depth if trainer.global_step < self.steps else None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the equilibrium."""
        _equilibrium(pl_module).depth = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a model that solves, also where the run ends in this phase."""
        _equilibrium(pl_module).depth = None


def _equilibrium(pl_module: LightningModule) -> Any:
    return pl_module.model.equilibrium  # type: ignore[union-attr]  # an AbstractTask
