"""Image classification with an equilibrium model."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastdeq.autocast import at_least_float32
from fastdeq.nn import DEQChain
from fastdeq.training.loss import LossWeights
from fastdeq.training.schedules import AbstractSchedule, SchedulerFactory
from fastdeq.training.task import AbstractTask, OptimizerFactory


class ClassificationTask(AbstractTask):
    """Cross entropy of logits (B, classes) with labels (B,), int64.

    Metrics and errors are those of `AbstractTask`, and accuracy: the share of samples whose largest
    logit is that of their label.

    top5: also log accuracy_top5, the share of samples whose label has one of the five largest
        logits.
    """

    monitor: tuple[str, Literal["min", "max"]] = ("accuracy", "max")

    def __init__(
        self,
        *,
        model: DEQChain,
        optimizer: OptimizerFactory,
        weights: LossWeights,
        schedule: AbstractSchedule | SchedulerFactory | None = None,
        seed: int = 0,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] | None = None,
        top5: bool = False,
    ) -> None:
        super().__init__(
            model=model,
            optimizer=optimizer,
            weights=weights,
            schedule=schedule,
            seed=seed,
            accumulate_grad_batches=accumulate_grad_batches,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
        )
        self.top5 = top5

    def criterion(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(at_least_float32(prediction), targets)

    def scores(self, prediction: Tensor, targets: Tensor) -> dict[str, Tensor]:
        scores = {"accuracy": (prediction.argmax(dim=1) == targets).float().mean()}
        if self.top5:
            found = (prediction.topk(5).indices == targets[:, None]).any(dim=1)
            scores["accuracy_top5"] = found.float().mean()
        return scores

    def check_fit(self, prediction: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point() or targets.ndim != 1:
            raise ValueError(
                f"classification takes one class number per sample, but the targets are "
                f"{targets.dtype} {tuple(targets.shape)}: use RegressionTask for this "
                "data (task._target_=fastdeq.training.RegressionTask)"
            )
        if targets.dtype not in (torch.int64, torch.uint8):
            raise ValueError(
                f"classification takes class numbers int64, but the targets are {targets.dtype}: "
                "convert them, targets.long()"
            )
        if prediction.ndim != 2 or int(targets.max()) >= prediction.shape[1]:
            raise ValueError(
                f"the model predicts {tuple(prediction.shape[1:])} per sample, but the data has a "
                f"class {int(targets.max())}: let the head have sizes.outputs outputs"
            )
        if self.top5 and prediction.shape[1] < 5:
            raise ValueError(
                f"top5 looks among five classes, but there are {prediction.shape[1]}: use "
                "task.top5=false"
            )
