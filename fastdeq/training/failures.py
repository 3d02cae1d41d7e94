"""Training steps that fail: told, left out, or the end of the run; the first is kept."""

import logging
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from fastdeq.training.ddp import carrying
from fastdeq.training.diagnosis import Diagnosis, Reading, with_norm
from fastdeq.training.failed_step import Step, StepBatch, save_failure
from fastdeq.training.random_state import taken_random_state
from fastdeq.training.task import AbstractTask

log = logging.getLogger("fastdeq")

OnFailure: TypeAlias = Literal["warn", "skip_step", "raise"]

_KEY = "fastdeq_failures"
_CALM = 100  # good steps that end a phase of failing ones: at most two lines in so many steps


class TrainingFailed(RuntimeError):
    """The run ends because of a training step, or many in a row, that failed."""


class _Tensors:
    """What a task is made of, found once: walking through its modules takes its time."""

    def __init__(self, task: AbstractTask) -> None:
        self.parameters = list(task.parameters())
        named = task.state_dict(keep_vars=True)
        self.named = {name: t.detach() for name, t in named.items() if isinstance(t, nn.Parameter)}
        """The parameters by all their names, sharing their memory."""
        self._holders = [
            (f"{name}.", module)
            for name, module in task.named_modules()
            if next(module.buffers(recurse=False), None) is not None
        ]

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def buffers(self) -> dict[str, Tensor]:
        """As they are now: a module may put another tensor in a buffer's place."""
        return {
            prefix + name: buffer
            for prefix, module in self._holders
            for name, buffer in module.named_buffers(recurse=False)
        }

    def put_back(self, kept: dict[str, Tensor]) -> None:
        for name, buffer in self.buffers().items():
            buffer.copy_(kept[name])


@dataclass
class _Record:
    """What later steps depend on, and a run that goes on needs."""

    kept: int | None = None  # the number of the step in failure.ckpt
    final: bool = False  # nothing will take its place
    rows: dict[str, list[Any]] = field(default_factory=dict)
    """For each setting that may end the run: how many steps up to now are in a row that it counts,
    and what was wrong with the first of them."""
    phase: list[int] = field(default_factory=list)  # its first step, its last failed, how many
    told: int = 0  # of this phase: that solves did not converge (1), that a step is not finite (2)


class Failures(Callback):
    """A training step fails where more than a share of its samples do not converge, in the forward
    or in the backward solve, or where its loss or the norm of its gradient is not finite. Steps of
    pretraining are no solves: only the latter counts.

    on_failure: `warn` tells of a phase of failing steps when it begins and how long it was.
        `skip_step` also leaves the optimizer step out: parameters, the optimizer's state and
        running statistics stay what they were, while the step counts for all schedules. `raise`
        ends the run.
    unconverged: the share; None: no share is too large.
    in_a_row: the run ends after so many failed steps that taught nothing (skipped, or not finite)
        without one between that did; None: never. Unconverged steps that were made do not count:
        much is learned from solves cut off at their step limit.
    unconverged_in_a_row: the run ends after so many failed steps in a row of whatever kind, those
        too; None: never.
    patience: `warn` tells, and keeps a step, when so many in a phase have not converged: the first
        solves of an untrained cell often do not, and soon do. What is not finite is told at once.

    The first step that is told is kept in failure.ckpt, to be run again by `mode=replay`; the first
    one that is not finite takes its place.

    The verdict is that of all processes together, and the same on all: 13 numbers of each go along
    with the averaged gradients (`CarryingDDP`). With `warn` they are read a step late, so that no
    device is waited for; otherwise once a step, after the backward pass. Accumulated gradients make
    one step of several batches, which is judged, counted and kept as a whole. An optimizer that
    evaluates its batch several times in a step (LBFGS) is judged by the first evaluation.

    Raises: ValueError for values out of range; in training, TrainingFailed.
    """

    def __init__(
        self,
        *,
        on_failure: OnFailure = "warn",
        unconverged: float | None = 0.5,
        in_a_row: int | None = 100,
        unconverged_in_a_row: int | None = None,
        patience: int = 10,
    ) -> None:
        if on_failure not in ("warn", "skip_step", "raise"):
            raise ValueError(
                f"Failures.on_failure is {on_failure!r}, but must be one of 'warn', 'skip_step', "
                "'raise'"
            )
        if unconverged is not None and not 0 <= unconverged <= 1:
            raise ValueError(
                f"Failures.unconverged is {unconverged}, but must be a share from 0 to 1, or null"
            )
        self.limits = {"in_a_row": in_a_row, "unconverged_in_a_row": unconverged_in_a_row}
        for name, limit in self.limits.items():
            if limit is not None and limit < 1:
                raise ValueError(f"Failures.{name} is {limit}, but must be at least 1, or null")
        if patience < 1:
            raise ValueError(f"Failures.patience is {patience}, but must be at least 1")
        self.on_failure, self.unconverged = on_failure, unconverged
        # What ends the run is kept, and so it must have been told by then.
        self.patience = min(patience, unconverged_in_a_row or patience)
        self._record = _Record()
        self._tensors: _Tensors | None = None
        self._now: Step | None = None
        self._pending: list[tuple[Step, Reading]] = []  # of all processes, on their way
        self._skip = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what the task is made of; nothing is left of a training before this one."""
        task = _task(pl_module)
        self._tensors = _Tensors(task)
        self._now, self._pending, self._skip = None, [], False
        if (strategy := carrying(trainer)) is not None:
            strategy.carry(_KEY, lambda: self._offer(task))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember how the step begins, and how each of its batches does.

        Raises: TrainingFailed, where the run that is gone on with had come to that.
        """
        self._stop_if_hopeless(trainer)
        self._skip = False
        if self._now is None:
            self._now = self._begun(trainer, _task(pl_module))
        random = None if self._record.final else taken_random_state()
        self._now.batches.append(StepBatch(batch=batch, random=random))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the batch; judge the step before, if it has waited.

        Raises: TrainingFailed.
        """
        if self._now is None:  # the optimizer evaluates the batch once more
            return
        if self.on_failure == "warn":
            self._settle(trainer, pl_module)
        self._now.end_batch(_task(pl_module))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judge the step, unless it may wait. Leave a failed one out: optimizers pass over
        parameters without a gradient.

        Raises: TrainingFailed.
        """
        if self._now is not None:
            step, self._now = self._now, None
            self._pending.append((step, self._reading(step, trainer)))
            if self.on_failure != "warn":
                self._settle(trainer, pl_module)
            self._stop_if_hopeless(trainer)
        if self._skip:
            for parameter in pl_module.parameters():
                parameter.grad = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last step, and end the phase that it may be in.

        Raises: TrainingFailed.
        """
        self._settle(trainer, pl_module)
        self._end_phase(trainer)
        self._stop_if_hopeless(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Judge the step before the one in which something else has ended the run; alone, since
        other processes may not come to this point.
        """
        if trainer.world_size == 1:
            with suppress(RuntimeError):  # of a device that has failed, too
                self._settle(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what later steps depend on, the one before this moment included."""
        self._settle(trainer, pl_module)
        checkpoint[_KEY] = asdict(self._record)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take it back."""
        self._record = _Record(**checkpoint.get(_KEY, {}))

    def _changing(self, tensors: "_Tensors") -> dict[str, Tensor]:
        """What the step may have changed by the time it is judged, and is then wanted."""
        if self.on_failure != "warn":
            return tensors.buffers()
        return {} if self._record.final else {**tensors.named, **tensors.buffers()}

    def _begun(self, trainer: Trainer, task: AbstractTask) -> Step:
        assert self._tensors is not None
        return Step(
            number=trainer.global_step,
            epoch=trainer.current_epoch,
            depth=task.model.equilibrium.depth,
            accumulates=trainer.accumulate_grad_batches,
            kept={name: tensor.clone() for name, tensor in self._changing(self._tensors).items()},
        )

    def _offer(self, task: AbstractTask) -> Tensor:
        """What other processes need for their verdict. They see the same averaged gradients."""
        assert self._now is not None
        self._now.end_batch(task)
        return self._now.figures

    def _reading(self, step: Step, trainer: Trainer) -> Reading:
        """The measures of a step on all processes, with the norm of its gradients."""
        assert self._tensors is not None
        rows = step.figures[None]
        if (strategy := carrying(trainer)) is not None:
            arrived = strategy.arrived(_KEY)
            assert arrived is not None  # gradients have been averaged
            rows = arrived
        # A scaler (16-mixed) deals with gradients that its scale has made infinite.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        return Reading(with_norm(rows, [] if scaled else self._tensors.gradients()))

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the steps that wait for it, on all processes together.

        Raises: TrainingFailed, with `raise`.
        """
        pending, self._pending = self._pending, []
        task = _task(pl_module)
        failed = [each for each, reading in pending if self._fails(each, reading, trainer, task)]
        if failed and self.on_failure == "skip_step":
            self._skip = True
            assert self._tensors is not None
            for step in failed:
                self._tensors.put_back(step.kept)

    def _fails(self, step: Step, reading: Reading, trainer: Trainer, task: AbstractTask) -> bool:
        """Judge a step, and tell and keep it if it is time to.

        Raises: TrainingFailed, with `raise`.
        """
        diagnosis = Diagnosis.of(reading.rows())
        failed, number = diagnosis.failed(self.unconverged), step.number
        self._count(failed, diagnosis)
        if not failed:
            self._calm(number, trainer)
        elif self._is_due(number, diagnosis):
            self._keep(step, diagnosis, trainer, task)
            self._tell(number, diagnosis, trainer)
        return failed

    def _count(self, failed: bool, diagnosis: Diagnosis) -> None:
        """The row of steps that taught nothing, and that of all that failed."""
        taught = not failed or (self.on_failure == "warn" and diagnosis.finite)
        rows = self._record.rows
        for name, goes_on in (("in_a_row", not taught), ("unconverged_in_a_row", failed)):
            count, cause = rows.pop(name, (0, ""))
            if goes_on:
                cause = cause or f"{diagnosis.symptom}; what helps: {diagnosis.advice}"
                rows[name] = [count + 1, cause]

    def _is_due(self, number: int, diagnosis: Diagnosis) -> bool:
        """Add a failed step to its phase; whether it is told, now or already."""
        first, _, count = self._record.phase or (number, number, 0)
        self._record.phase = [first, number, count + 1]
        waits = self.on_failure == "warn" and diagnosis.finite
        return bool(self._record.told) or not waits or count + 1 >= self.patience

    def _keep(
        self, failed: Step, diagnosis: Diagnosis, trainer: Trainer, task: AbstractTask
    ) -> None:
        """The first step that is told, and then the first that is not finite."""
        record = self._record
        if record.kept is not None and (record.final or diagnosis.finite):
            return
        record.kept, record.final = failed.number, not diagnosis.finite
        save_failure(failed, diagnosis, trainer, task)

    def _tell(self, number: int, diagnosis: Diagnosis, trainer: Trainer) -> None:
        """A line where a phase begins, and one where it turns non-finite.

        Raises: TrainingFailed, with `raise`.
        """
        kind = 1 if diagnosis.finite else 2
        helps = f"what helps: {diagnosis.advice}"
        line = f"step {number:,}: {diagnosis.symptom}; {helps}; {self._replay(trainer)}"
        if self.on_failure == "raise":
            raise TrainingFailed(line)
        if trainer.is_global_zero and kind > self._record.told:
            log.warning("%s", line)
        self._record.told = max(kind, self._record.told)

    def _calm(self, number: int, trainer: Trainer) -> None:
        """After a step that did not fail."""
        if self._record.phase and number - self._record.phase[1] >= _CALM:
            self._end_phase(trainer)

    def _end_phase(self, trainer: Trainer) -> None:
        phase, told = self._record.phase, self._record.told
        self._record.phase, self._record.told = [], 0
        if not told or not trainer.is_global_zero:
            return
        first, last, count = phase
        if last > first:  # of a single step all has been said
            done = "and were skipped" if self.on_failure == "skip_step" else "and were made"
            log.warning(
                "steps %s to %s: %s of %s failed %s",
                *(f"{number:,}" for number in (first, last, count, last - first + 1)),
                done,
            )

    def _stop_if_hopeless(self, trainer: Trainer) -> None:
        for name, (row, cause) in self._record.rows.items():
            limit = self.limits[name]
            if limit is not None and row >= limit:
                steps = "step" if row == 1 else f"{row:,} steps in a row"
                why = f"the last {steps} failed; at the first of them {cause}"
                raise TrainingFailed(f"{why}; {self._replay(trainer)}")

    def _replay(self, trainer: Trainer) -> str:
        """The command that makes the kept step again."""
        command = f"python train.py mode=replay from_run={trainer.default_root_dir}"
        return f"step {self._record.kept:,} again: {command}"


def _task(pl_module: LightningModule) -> AbstractTask:
    assert isinstance(pl_module, AbstractTask)
    return pl_module
