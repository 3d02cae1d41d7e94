"""L6: image classification with an equilibrium model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from fastdeq.models import DEQChain
from fastdeq.solution import Solution
from fastdeq.tasks.objective import LossWeights

Batch = tuple[Tensor, Tensor]


class ClassificationTask(LightningModule):
    """Cross entropy plus the weighted regularizers, with the solver's figures logged beside
    accuracy.

    model: returns (logits (B, classes), solution). optimizer: takes the parameters, returns the
    optimizer. weights: of the regularizers. classes: how many.

    Logged by epoch as `<stage>/<figure>`, stage train, val or test: loss (in training with its
    regularizers), accuracy, nfe (mean over samples), residual (relative, mean), unconverged (share
    of samples); in training also the parts of the loss, nfe_backward and unconverged_backward; in
    evaluation, for models that predict z₀, explicit_accuracy: the head on z₀ without a solve.
    """

    def __init__(
        self,
        *,
        model: DEQChain,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        weights: LossWeights,
        classes: int,
    ) -> None:
        super().__init__()
        if weights.skip and not model.equilibrium.initializer.predicts:
            raise ValueError(
                "the skip loss would draw z* to zero in a model that predicts nothing: use a skip "
                "model (model=skip_deq), or no skip loss (loss=plain)"
            )
        self.model = model
        self.make_optimizer = optimizer
        self.weights = weights
        self.accuracy = nn.ModuleDict(
            {f"{stage}_stage": _accuracy(classes) for stage in ("train", "val", "test")}
        )
        self.explicit_accuracy = nn.ModuleDict(
            {f"{stage}_stage": _accuracy(classes) for stage in ("val", "test")}
        )
        self._solution: Solution | None = None  # of the step under way: its backward is to come

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over all parameters."""
        return self.make_optimizer(self.parameters())

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss of a batch."""
        x, labels = batch
        logits, solution = self.model(x, jacobian_loss=self.weights.jacobian > 0)
        self._solution = solution
        parts = self.weights.parts(solution)
        loss = torch.stack([cross_entropy(logits, labels), *parts.values()]).sum()
        self._log_figures("train", labels, logits, solution, loss)
        self._log_all("train", {f"loss_{name}": part for name, part in parts.items()}, len(labels))
        return loss

    def on_after_backward(self) -> None:
        """Log how the adjoint's solve went."""
        solution, self._solution = self._solution, None
        if solution is not None and solution.backward.stats is not None:
            stats = solution.backward.stats
            figures = {
                "nfe_backward": stats.nfe.float().mean(),
                "unconverged_backward": (~stats.converged).float().mean(),
            }
            self._log_all("train", figures, len(solution.status))

    def validation_step(self, batch: Batch, index: int) -> None:
        """Figures of a batch of the validation set."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, index: int) -> None:
        """Figures of a batch of the test set."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        x, labels = batch
        logits, solution = self.model(x)
        self._log_figures(stage, labels, logits, solution, cross_entropy(logits, labels))
        if self.model.equilibrium.initializer.predicts:
            metric = self.explicit_accuracy[f"{stage}_stage"]
            metric(self.model.explicit(x), labels)
            self._log_all(stage, {"explicit_accuracy": metric}, len(labels))

    def _log_figures(
        self, stage: str, labels: Tensor, logits: Tensor, solution: Solution, loss: Tensor
    ) -> None:
        metric = self.accuracy[f"{stage}_stage"]
        metric(logits, labels)
        figures: dict[str, Any] = {
            "loss": loss.detach(),
            "accuracy": metric,
            "nfe": solution.nfe.float().mean(),
            "residual": solution.relative_residual.float().mean(),
        }
        self._log_all(stage, figures, len(labels))
        if stage == "train":  # the step's own figures, for the progress bar alone
            now = {**figures, "accuracy": (logits.argmax(dim=1) == labels).float().mean()}
            self.log_dict(now, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        unconverged = (~solution.converged).float().mean()
        self._log_all(stage, {"unconverged": unconverged}, len(labels))

    def _log_all(self, stage: str, figures: dict[str, Any], size: int) -> None:
        named = {f"{stage}/{name}": figure for name, figure in figures.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=size)


def _accuracy(classes: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(classes, average="micro")
