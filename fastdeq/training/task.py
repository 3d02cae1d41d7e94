"""What all tasks share: the training step, the evaluation, and the figures they log."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, SupportsFloat, TypeAlias

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from fastdeq.nn import DEQChain, ExplicitNetwork
from fastdeq.solution import Solution
from fastdeq.timer import Stopwatch
from fastdeq.training.loss import LossWeights
from fastdeq.training.metrics import (
    Figure,
    FigureMeans,
    backward_figures,
    mean_metrics,
    solver_figures,
)
from fastdeq.training.schedules import AbstractSchedule, Constant, SchedulerFactory, as_schedule

Batch: TypeAlias = tuple[Tensor, Tensor, float]
"""Inputs, targets, and what this process's mean counts for (0: the batch only stands in)."""

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_Recorded: TypeAlias = tuple[dict[str, Any], int, dict[str, Any]]
"""Metrics of a batch, its number of samples, and its seconds."""

STAGES = ("train", "val", "test")
METRICS = (
    *("loss", "loss_task", "loss_skip", "loss_jacobian", "loss_residual"),
    *("accuracy", "accuracy_top5"),
    *("nfe", "residual", "unconverged"),
    *("nfe_backward", "residual_backward", "unconverged_backward"),
    *("seconds", "solve_seconds", "backward_seconds"),
    *("explicit_loss", "explicit_accuracy", "explicit_accuracy_top5", "explicit_seconds"),
)


class AbstractTask(LightningModule):
    """An equilibrium model, its loss and its figures.

    model: returns (prediction, solution). optimizer: takes the parameters, returns the optimizer.
    weights: of the regularizers. schedule: of the learning rate; or what takes the optimizer and
    returns a scheduler of torch, to be moved on at every epoch.
    seed: of draws that all processes must agree on.

    Figures of an epoch are logged as `<stage>/<figure>`, stage train, val or test, those of every
    `log_every_n_steps`-th optimizer step as `step/<figure>` (on several devices: of the first), the
    mean over its batches where gradients are accumulated. An optimizer that evaluates a batch
    several times in a step (LBFGS) has the metrics of the first evaluation.

    loss (in training with its regularizers; its parts are loss_task, loss_skip, loss_jacobian,
    loss_residual), accuracy; nfe, residual (relative) and unconverged (share) of the forward solve,
    means over samples; seconds (of a whole optimizer step, or of a prediction) and solve_seconds
    (of the forward solve of a batch), means over steps or batches; in training nfe_backward,
    residual_backward, unconverged_backward and backward_seconds of the adjoint's solve (of a neural
    ODE's integration backwards nfe_backward and backward_seconds alone); in evaluation, for models
    that predict z₀, explicit_loss, explicit_accuracy and explicit_seconds: the head on z₀, no
    solve.

    Raises: ValueError for a skip loss with a model that predicts nothing.
    """

    monitor: tuple[str, Literal["min", "max"]]
    """The figure that tells how good a model is, and which direction is better."""

    def __init__(
        self,
        *,
        model: DEQChain,
        optimizer: OptimizerFactory,
        weights: LossWeights,
        schedule: AbstractSchedule | SchedulerFactory | None = None,
        seed: int = 0,
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
        self.schedule = as_schedule(schedule)
        self.seed = seed
        self.means = nn.ModuleDict({f"{stage}_means": FigureMeans(METRICS) for stage in STAGES})
        self.share = 1.0
        """What this process's last batch counts for among those of all processes."""
        self._step: tuple[Solution, dict[str, Any]] | None = None  # its backward pass is to come
        self._batches: list[_Recorded] = []  # of the optimizer step that is made or was made last
        self._number = -1  # of that step
        self._rate = 0.0  # its learning rate
        self._is_recorded = False  # the batch: an optimizer may evaluate it several times

    @abstractmethod
    def criterion(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """The task's loss, a scalar: the mean over the batch."""

    @abstractmethod
    def scores(self, prediction: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What is reported beside the loss: scalars, means over the batch."""

    @abstractmethod
    def check_fit(self, prediction: Tensor, targets: Tensor) -> None:
        """Raises: ValueError where the criterion cannot compare the two."""

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether some parameters get no gradient: an explicit network that no loss draws to z*."""
        explicit = isinstance(self.model.equilibrium.initializer, ExplicitNetwork)
        return explicit and not self.weights.skip

    @property
    def training_means(self) -> FigureMeans:
        """The sums of this epoch's training figures, which a run that goes on must have."""
        means = self.means["train_means"]
        assert isinstance(means, FigureMeans)
        return means

    def configure_optimizers(self) -> Any:
        """The optimizer over all parameters, and its schedule."""
        optimizer = self.make_optimizer(self.parameters())
        if isinstance(self.schedule, Constant):
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [self.schedule.config(optimizer, steps, f"val/{self.monitor[0]}")]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Note whether the batch begins an optimizer step, or is accumulated to one."""
        self._is_recorded = False
        if self._number != self.global_step:
            self._number, self._batches = self.global_step, []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss of a batch, in proportion to this process's share of the samples."""
        self.share = batch[2]
        loss, solution, figures = self.minimized(batch, self.global_step)
        if batch[2] and not self._is_recorded:
            self._step = (solution, figures)
        return loss

    def minimized(self, batch: Batch, step: int) -> tuple[Tensor, Solution, dict[str, Any]]:
        """What optimizer step number `step` (from 0) minimizes on this batch: the loss times the
        batch's weight, with the solution and the figures that are known before the backward pass.
        """
        x, targets, weight = batch
        estimate = self.weights.wants_jacobian(step, self.seed)
        prediction, solution = self.model(x, jacobian_loss=estimate)
        parts = {"task": self.criterion(prediction, targets), **self.weights.parts(solution)}
        loss = torch.stack(list(parts.values())).sum()
        named = {f"loss_{name}": part.detach() for name, part in parts.items()}
        scores = self.scores(prediction.detach(), targets)
        figures = {"loss": loss.detach(), **named, **scores, **solver_figures(solution)}
        return loss if weight == 1 else loss * weight, solution, figures

    @property
    def step_under_way(self) -> tuple[Solution, dict[str, Any]] | None:
        """Solution and metrics of the batch whose backward pass is being made or has just been
        made; None between batches, for a batch that only stands in (weight 0), and while an
        optimizer evaluates a batch once more.
        """
        return self._step

    def on_after_backward(self) -> None:
        """Record the batch's figures, now that the adjoint's solve is known too."""
        if self._step is None:
            return
        (solution, figures), self._step, self._is_recorded = self._step, None, True
        seconds = {"solve_seconds": solution.elapsed}
        figures |= backward_figures(solution.backward)
        if solution.backward.stats is not None:
            seconds["backward_seconds"] = solution.backward.stats.elapsed
        self.record("train", figures, len(solution.status))
        self.record("train", seconds)
        self._batches.append((figures, len(solution.status), seconds))
        self._rate = self.trainer.optimizers[0].param_groups[0]["lr"]

    def log_step(self, seconds: SupportsFloat) -> None:
        """Log the metrics of the optimizer step that has just ended, with its `seconds`, where it
        is one of every `log_every_n_steps`. To be called after its last batch.
        """
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set at run time
        if not every or self.global_step % every or not self._batches:  # 0: never
            return
        figures = mean_metrics([(figures, samples) for figures, samples, _ in self._batches])
        figures |= mean_metrics([(seconds, 1) for _, _, seconds in self._batches])
        figures |= {"seconds": float(seconds), "lr": self._rate}
        named = {f"step/{name}": value for name, value in figures.items()}
        self.log_dict(named, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        for logger in self.trainer.loggers:
            row = {"epoch": self.current_epoch, **named}
            logger.log_metrics(row, step=self.global_step - 1)

    def validation_step(self, batch: Batch, index: int) -> None:
        """Figures of a batch of the validation set."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, index: int) -> None:
        """Figures of a batch of the test set."""
        self._evaluate("test", batch)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means."""
        self._log_means("train")

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation set."""
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over the test set."""
        self._log_means("test")

    def record(self, stage: str, figures: Mapping[str, Figure], weight: float = 1) -> None:
        """Add figures to the stage's means: of so many samples, or of one batch."""
        means = self.means[f"{stage}_means"]
        assert isinstance(means, FigureMeans)
        means.update(figures, weight)

    def check_model(self, batch: Batch) -> None:
        """Run the model once, without gradients and without touching any random state.

        Raises: ValueError where the model cannot take these inputs, or predicts something that does
        not go with these targets.
        """
        x, targets, _ = batch
        training = self.model.training
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                prediction, _ = self.model.eval()(x)
            except (RuntimeError, ValueError, TypeError) as error:
                is_tensor = isinstance(x, Tensor)
                found = f"shape {tuple(x.shape[1:])}" if is_tensor else f"type {type(x).__name__}"
                raise ValueError(
                    f"the model does not take inputs of {found} ({error}): choose the arch that "
                    "goes with the data, or set its sizes"
                ) from error
            finally:
                self.model.train(training)
        self.check_fit(prediction, targets)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        x, targets, weight = batch
        if not weight:
            return
        watch = Stopwatch(self.device)
        prediction, solution = self.model(x)
        seconds = {"seconds": watch.stop(), "solve_seconds": solution.elapsed}
        figures = {"loss": self.criterion(prediction, targets)}
        figures |= self.scores(prediction, targets) | solver_figures(solution)
        if self.model.equilibrium.initializer.predicts:
            watch = Stopwatch(self.device)
            explicit = self.model.explicit(x)
            seconds["explicit_seconds"] = watch.stop()
            figures["explicit_loss"] = self.criterion(explicit, targets)
            scores = self.scores(explicit, targets)
            figures |= {f"explicit_{name}": score for name, score in scores.items()}
        self.record(stage, figures, len(targets))
        self.record(stage, seconds)

    def _log_means(self, stage: str) -> None:
        means = self.means[f"{stage}_means"]
        assert isinstance(means, FigureMeans)
        figures = means.compute()
        means.reset()
        # Already the same on all processes: nothing is left to synchronize.
        self.log_dict({f"{stage}/{name}": figure.float() for name, figure in figures.items()})
