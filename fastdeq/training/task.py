"""The base class of tasks: the training step, the evaluation, and the metrics."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial, reduce
from typing import Any, Literal, Self, TypeAlias, TypeVar

import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

import fastdeq
from fastdeq.nn import DEQChain, ExplicitNetwork
from fastdeq.notation import State
from fastdeq.solution import TraceKind
from fastdeq.timer import Stopwatch
from fastdeq.training.ddp import averaged_gradients
from fastdeq.training.diagnosis import measure
from fastdeq.training.failures import VERDICT, Failures
from fastdeq.training.loss import LossWeights
from fastdeq.training.metrics import (
    MeanMetrics,
    Value,
    mean_metrics,
    solver_metrics,
)
from fastdeq.training.pretraining import Pretraining
from fastdeq.training.reuse import Reuse
from fastdeq.training.schedules import AbstractSchedule, Constant, SchedulerFactory, as_schedule
from fastdeq.training.step import BatchResult, Evaluation, StepResult

Batch: TypeAlias = tuple[Tensor, Tensor, float]
"""Inputs, targets, and the weight of this process's mean (0: the batch is a placeholder)."""

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_C = TypeVar("_C", bound=Callback)


STAGES = ("train", "val", "test")
METRICS = (
    *("loss", "loss_task", "loss_skip", "loss_jacobian", "loss_residual", "loss_correction"),
    *("accuracy", "accuracy_top5"),
    *("nfe", "residual", "unconverged", "spectral_radius"),
    *("nfe_backward", "residual_backward", "unconverged_backward"),
    *("seconds", "solve_seconds", "backward_seconds"),
    *("explicit_loss", "explicit_accuracy", "explicit_accuracy_top5", "explicit_seconds"),
)


class AbstractTask(LightningModule):
    """An equilibrium model, its loss and its metrics.

    model: returns (prediction, solution).
    optimizer: takes the parameters, returns the optimizer.
    weights: of the regularizers.
    schedule: of the learning rate; or a function that takes the optimizer and returns a scheduler
        of torch, which is then stepped after every epoch.
    seed: of draws that must be the same on all processes.
    accumulate_grad_batches: batches per optimizer step; the last step of an epoch takes those that
        are left.
    gradient_clip_val, gradient_clip_algorithm: as in Lightning's trainer. `training_step` applies
        these three itself (manual optimization).

    The metrics of an epoch are logged as `<stage>/<metric>` with stage train, val or test. Those of
    every `log_every_n_steps`-th optimizer step are logged as `step/<metric>`, of the first device,
    as means over its batches if gradients are accumulated. For an optimizer that evaluates a batch
    several times per step (LBFGS) they are those of the first evaluation.

    - loss (in training with its regularizers, whose parts are loss_task, loss_skip, loss_jacobian,
      loss_residual and loss_correction) and accuracy.
    - nfe, residual (relative) and unconverged (share) of the forward solve: means over samples.
    - seconds (of a whole optimizer step, or of a prediction) and solve_seconds (of the forward
      solve of a batch): means over steps or batches.
    - In training: nfe_backward, residual_backward, unconverged_backward and backward_seconds of the
      adjoint's solve. The backward integration of a neural ODE has nfe_backward and
      backward_seconds only.
    - In evaluation, where `RecordEquilibria` measures it: spectral_radius of ∂f/∂z.
    - In evaluation, for models that predict z₀: explicit_loss, explicit_accuracy and
      explicit_seconds of the head on z₀, without a solve.

    Raises: ValueError for a skip loss with a model that does not predict z₀, and for a correction
    loss of states that the model's solver does not reach.
    """

    monitor: tuple[str, Literal["min", "max"]]
    """The metric that a model is judged by, and which direction is better."""

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
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # the whole step is in `training_step`
        weights.check(model)
        self.model = model
        self.make_optimizer = optimizer
        self.weights = weights
        self.schedule = as_schedule(schedule).following(f"val/{self.monitor[0]}")
        self.seed = seed
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.means = nn.ModuleDict({f"{stage}_means": MeanMetrics(METRICS) for stage in STAGES})
        self._accumulated: StepResult | None = None  # a step whose last batch is still to come

    @abstractmethod
    def criterion(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """The task's loss, a scalar: the mean over the batch."""

    @abstractmethod
    def scores(self, prediction: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Further metrics beside the loss: scalars, means over the batch."""

    @abstractmethod
    def check_fit(self, prediction: Tensor, targets: Tensor) -> None:
        """Raises: ValueError if the criterion cannot compare the two."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **parts: Any,
    ) -> Self:
        """The task of a checkpoint, in evaluation mode. Without `parts` it is built from the
        configuration of its run: hparams_file, or the config.yaml beside the checkpoint. Given the
        arguments of the class as `parts`, Lightning's own method builds it.

        Raises: as `fastdeq.load` does; TypeError for a checkpoint of another class.
        """
        if parts:
            loaded: Self = super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **parts
            )
            return loaded
        task: AbstractTask = fastdeq.load_task(checkpoint_path, hparams_file)
        if not isinstance(task, cls):
            found = type(task).__name__
            raise TypeError(f"{checkpoint_path} is of a {found}: use {found}.load_from_checkpoint")
        return task if map_location is None else task.to(map_location)

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether some parameters get no gradient: an explicit network without a skip loss."""
        starts = [layer.initializer for layer in self.model.equilibria]
        explicit = any(isinstance(each, ExplicitNetwork) for each in starts)
        return explicit and not self.weights.skip

    @property
    def training_means(self) -> MeanMetrics:
        """The sums of this epoch's training metrics, which a resumed run must have."""
        means = self.means["train_means"]
        assert isinstance(means, MeanMetrics)
        return means

    def configure_optimizers(self) -> Any:
        """The optimizer over all parameters, and the scheduler of its learning rate."""
        optimizer = self.make_optimizer(self.parameters())
        if isinstance(self.schedule, Constant):
            return optimizer
        return [optimizer], [self.schedule.build(optimizer, self._count_steps())]

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Train on a batch: forward and backward. The last batch of an optimizer step is followed
        by the verdict, the optimizer (unless it is skipped), and the metrics.

        Returns: `loss`, and `step`: the `StepResult` that this batch completes, or None. Callbacks
            find it as `outputs["step"]` in `on_train_batch_end`.
        """
        watch, optimizer = Stopwatch(self.device), self._optimizer()
        failures, last = self._callback(Failures), self._is_last(batch_idx)
        step = self._accumulated if batch_idx and self._accumulated else self._begin(failures)
        random = None if failures is None else failures.random_state()

        # Forward: stem, solve, head, and the loss with its regularizers.
        if not step.batches:
            optimizer.zero_grad()
        reuse = self._callback(Reuse) if step.depth is None else None
        z0 = None if reuse is None else reuse.start(self.trainer, self.device)
        loss, solution, metrics = self.evaluate(batch, step.number, depth=step.depth, z0=z0)
        part = loss / step.accumulates
        measures = cache(lambda: measure(batch, solution, part.detach()))

        # Backward: the adjoint's solve. The gradients of all processes are averaged at its end.
        payloads = {VERDICT: lambda: step.measures(measures())}
        with averaged_gradients(self.trainer, last=last, weight=batch[2], payloads=payloads):
            self._backward(part)
        if reuse is not None:
            reuse.keep(self.trainer, solution)
        # Gradients are accumulated to save memory: states are then kept only if a replay needs z0.
        keep = random is not None and (step.accumulates == 1 or reuse is not None)
        result = BatchResult.of(
            batch, solution, metrics, measures(), watch, random, start=z0, keep_states=keep
        )
        step = step.with_batch(result)
        self._accumulated = None if last else step
        if not last:
            return {"loss": loss.detach(), "step": None}

        # Verdict on the step: `failures` may raise, or skip the optimizer.
        if failures is not None and failures.judge(step, self.trainer, self):
            self._count_skipped_step()
        else:
            self._clip(optimizer)
            losses = [loss]  # the first evaluation is done; LBFGS needs more
            again = partial(self._evaluate_again, batch, step, z0)
            optimizer.step(lambda: losses.pop() if losses else again())
        self._move_schedule("step", step.number + 1)

        watch.stop()
        self._record_step(step)
        return {"loss": loss.detach(), "step": step}

    def evaluate(
        self,
        batch: Batch,
        step: int,
        *,
        z0: State | None = None,
        depth: int | None = None,
        trace: TraceKind | None = None,
    ) -> Evaluation:
        """The loss that optimizer step number `step` (from 0) minimizes on this batch, times the
        batch's weight. z0, depth, trace: as in `DEQChain.forward`.
        """
        x, targets, weight = batch
        estimate = self.weights.wants_jacobian(step, self.seed)
        states = {} if depth is not None else self.weights.states  # unrolled steps have none
        prediction, solution = self.model(
            x, z0=z0, jacobian_loss=estimate, depth=depth, trace=trace, **states
        )
        parts = {
            "task": self.criterion(prediction, targets),
            **self.weights.parts(
                solution, lambda z: self.criterion(self.model.predict_from(z), targets)
            ),
        }
        loss = reduce(torch.add, parts.values())
        named = {f"loss_{name}": part.detach() for name, part in parts.items()}
        scores = self.scores(prediction.detach(), targets)
        metrics = {"loss": loss.detach(), **named, **scores, **solver_metrics(solution)}
        return Evaluation(loss if weight == 1 else loss * weight, solution, metrics)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means, and step a schedule of epochs."""
        self._log_means("train")
        self._move_schedule("epoch", self.current_epoch + 1)

    def validation_step(self, batch: Batch, index: int) -> dict[str, Any] | None:
        """Metrics of a batch of the validation set; returns its `solution` for callbacks."""
        return self._evaluate_stage("val", batch)

    def test_step(self, batch: Batch, index: int) -> dict[str, Any] | None:
        """Metrics of a batch of the test set; returns its `solution` for callbacks."""
        return self._evaluate_stage("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation set."""
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over the test set."""
        self._log_means("test")

    def record(self, stage: str, metrics: Mapping[str, Value], weight: float = 1) -> None:
        """Add metrics to the stage's means, with the number of samples as `weight`, or 1."""
        means = self.means[f"{stage}_means"]
        assert isinstance(means, MeanMetrics)
        means.update(metrics, weight)

    def check_model(self, batch: Batch) -> None:
        """Run the model once, without gradients and without touching any random state.

        Raises: ValueError if the model cannot take these inputs, or its predictions do not match
        these targets.
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
                    f"the model does not take inputs of {found} ({error}): choose the arch "
                    "of the data, or set its sizes"
                ) from error
            finally:
                self.model.train(training)
        self.check_fit(prediction, targets)

    # Parts of the training step

    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    def _callback(self, kind: type[_C]) -> _C | None:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # run time
        return next((each for each in callbacks if isinstance(each, kind)), None)

    def _is_last(self, batch_idx: int) -> bool:
        """Whether the batch completes an optimizer step."""
        accumulated = (batch_idx + 1) % self.accumulate_grad_batches == 0
        ends = self.trainer.is_last_batch or batch_idx + 1 == self.trainer.num_training_batches
        return accumulated or ends

    def _begin(self, failures: Failures | None) -> StepResult:
        """A step without its batches.

        Raises: TrainingFailed if the resumed run had reached its limit of failed steps.
        """
        pretraining, number = self._callback(Pretraining), self.global_step
        return StepResult(
            number=number,
            epoch=self.current_epoch,
            depth=None if pretraining is None else pretraining.depth_of(number),
            accumulates=self.accumulate_grad_batches,
            rate=self._optimizer().param_groups[0]["lr"],
            before={} if failures is None else failures.begin(self.trainer),
        )

    def _backward(self, loss: Tensor) -> None:
        # Lightning's autocast covers all of `training_step`; a backward pass must not have it.
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss)

    def _clip(self, optimizer: LightningOptimizer) -> None:
        if not self.gradient_clip_val:
            return
        # A scaler (16-mixed) has multiplied the gradients, so the limit is multiplied too.
        precision = self.trainer.precision_plugin
        scaler = getattr(precision, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        # `clip_gradients` would refuse a fused optimizer, which divides by the scale in its step.
        by_value = self.gradient_clip_algorithm == "value"
        clip = precision.clip_grad_by_value if by_value else precision.clip_grad_by_norm
        clip(optimizer.optimizer, self.gradient_clip_val * scale)

    def _evaluate_again(self, batch: Batch, step: StepResult, z0: State | None) -> Tensor:
        """For an optimizer that evaluates the batch several times."""
        optimizer = self._optimizer()
        optimizer.zero_grad()
        loss, _, _ = self.evaluate(batch, step.number, z0=z0, depth=step.depth)
        self._backward(loss)
        self._clip(optimizer)
        return loss

    def _count_skipped_step(self) -> None:
        """Count a skipped step in `global_step`, and thereby for schedules and limits."""
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()

    def _move_schedule(self, interval: str, number: int) -> None:
        """Step the schedule after the number-th step or epoch (from 1), if that is due."""
        scheduler = self.lr_schedulers()
        if scheduler is None or not self.schedule.is_due(interval, number):
            return
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(self.trainer.callback_metrics[self.schedule.monitor or ""])
        else:
            scheduler.step()  # type: ignore[union-attr]  # one scheduler, not a list

    def extend_schedule(self) -> None:
        """Move the schedule of a shorter run to this run's; see `AbstractSchedule.extend`."""
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, LRScheduler):
            self.schedule.extend(scheduler, self._count_steps())

    def _count_steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        trainer = self.trainer
        batches = trainer.estimated_stepping_batches  # Lightning knows of no accumulation here
        if self.accumulate_grad_batches == 1 or trainer.max_epochs in (None, -1):
            return int(batches)
        per_epoch = math.ceil(trainer.num_training_batches / self.accumulate_grad_batches)
        steps = per_epoch * trainer.max_epochs
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    def _record_step(self, step: StepResult) -> None:
        """Add the step's metrics to the epoch's means; log every n-th step."""
        batches = [each for each in step.batches if each.samples]
        for batch in batches:
            self.record("train", batch.metrics, batch.samples)
            self.record("train", batch.seconds)
        self.record("train", {"seconds": step.seconds})
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set at run time
        if not batches or not every or self.global_step % every:  # 0: never
            return
        metrics = mean_metrics([(each.metrics, each.samples) for each in batches])
        metrics |= mean_metrics([(each.seconds, 1) for each in batches])
        metrics |= {"seconds": float(step.seconds), "lr": step.rate}
        named = {f"step/{name}": value for name, value in metrics.items()}
        # `log_dict` would also prepare a mean over the epoch, which takes longer than the step.
        self.trainer.callback_metrics.update(
            {name: torch.tensor(value) for name, value in named.items()}
        )
        self._write({"epoch": step.epoch, **named}, step.number)

    def _write(self, row: Mapping[str, float], number: int) -> None:
        """Log a row directly: Lightning would count batches instead of optimizer steps."""
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(row), step=number)

    def _evaluate_stage(self, stage: str, batch: Batch) -> dict[str, Any] | None:
        x, targets, weight = batch
        if not weight:
            return None
        watch = Stopwatch(self.device)
        prediction, solution = self.model(x)
        seconds = {"seconds": watch.stop(), "solve_seconds": solution.elapsed}
        metrics = {"loss": self.criterion(prediction, targets)}
        metrics |= self.scores(prediction, targets) | solver_metrics(solution)
        if self.model.predicts:
            watch = Stopwatch(self.device)
            explicit = self.model.explicit(x)
            seconds["explicit_seconds"] = watch.stop()
            metrics["explicit_loss"] = self.criterion(explicit, targets)
            scores = self.scores(explicit, targets)
            metrics |= {f"explicit_{name}": score for name, score in scores.items()}
        self.record(stage, metrics, len(targets))
        self.record(stage, seconds)
        return {"solution": solution}

    def _log_means(self, stage: str) -> None:
        means = self.means[f"{stage}_means"]
        assert isinstance(means, MeanMetrics)
        metrics = {f"{stage}/{name}": mean.float() for name, mean in means.compute().items()}
        means.reset()
        # The means are the same on all processes already: nothing is left to synchronize.
        self.log_dict(metrics, logger=False)
        if not self.trainer.sanity_checking:
            row = {name: float(mean) for name, mean in metrics.items()}
            number = self.global_step if stage == "test" else self.global_step - 1
            self._write({"epoch": self.current_epoch, **row}, number)
