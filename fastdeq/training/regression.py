"""Regression with an equilibrium model."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import mse_loss

from fastdeq.autocast import at_least_float32
from fastdeq.training.task import AbstractTask


class RegressionTask(AbstractTask):
    """Mean squared error of predictions and targets of the same shape (B, ...), in the square of
    the target's unit. Metrics and errors are those of `AbstractTask`, without accuracy.
    """

    monitor: tuple[str, Literal["min", "max"]] = ("loss", "min")

    def criterion(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(at_least_float32(prediction), at_least_float32(targets))

    def scores(self, prediction: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {}

    def check_fit(self, prediction: Tensor, targets: Tensor) -> None:
        if not targets.is_floating_point():
            raise ValueError(
                f"regression takes floating-point targets, but these are {targets.dtype}: use "
                "ClassificationTask for this data "
                "(task._target_=fastdeq.training.ClassificationTask)"
            )
        if prediction.shape != targets.shape:
            raise ValueError(
                f"the model predicts {tuple(prediction.shape[1:])} per sample, but the targets are "
                f"{tuple(targets.shape[1:])}: let the head have sizes.outputs outputs"
            )
