"""Training steps that fail: reported, skipped, or the end of the run; the first one is kept."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from fastdeq.commands import typed
from fastdeq.training.ddp import payload_strategy
from fastdeq.training.diagnosis import Diagnosis, Reading, with_norm
from fastdeq.training.failure_file import save_failure
from fastdeq.training.random_state import taken_random_state
from fastdeq.training.step import StepResult

log = logging.getLogger("fastdeq")

OnFailure: TypeAlias = Literal["warn", "skip_step", "raise"]

VERDICT = "fastdeq_failures"
"""The name of what a verdict needs from all processes, and of its state in a checkpoint."""

_COOLDOWN = 100  # good steps that end a phase of failing ones: at most two lines per 100 steps


class TrainingFailed(RuntimeError):
    """The run ends because of a training step, or many in a row, that failed."""


class _Tensors:
    """The tensors of a module, collected once: walking through its submodules takes time."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = list(module.parameters())
        named = module.state_dict(keep_vars=True)
        self.named = {name: t.detach() for name, t in named.items() if isinstance(t, nn.Parameter)}
        """The parameters by all their names, sharing their memory."""
        self._holders = [
            (f"{name}.", each)
            for name, each in module.named_modules()
            if next(each.buffers(recurse=False), None) is not None
        ]

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def buffers(self) -> dict[str, Tensor]:
        """As they are now: a module may replace a buffer by another tensor."""
        return {
            prefix + name: buffer
            for prefix, module in self._holders
            for name, buffer in module.named_buffers(recurse=False)
        }

    def restore(self, before: Mapping[str, Tensor]) -> None:
        for name, buffer in self.buffers().items():
            buffer.copy_(before[name])


@dataclass
class _Record:
    """What later steps depend on, and a resumed run needs."""

    kept: int | None = None  # the number of the step in failure.ckpt
    final: bool = False  # nothing will replace it
    rows: dict[str, list[Any]] = field(default_factory=dict)
    """For each setting that may end the run: how many steps up to now are in a row that it counts,
    and what was wrong with the first of them."""
    phase: list[int] = field(default_factory=list)  # its first step, its last failed, how many
    reported: int = 0  # of this phase: unconverged solves (1), a step that is not finite (2)


class Failures(Callback):
    """The verdict on a training step, between its backward pass and the optimizer.

    A step fails if more than a share of its samples do not converge, in the forward or in the
    backward solve, or if its loss or the norm of its gradient is not finite. Steps of pretraining
    solve nothing: only the latter counts.

    on_failure: `warn` reports a phase of failing steps at its beginning, and its length.
        `skip_step` also skips the optimizer: parameters, the optimizer's state and running
        statistics stay what they were, while the step counts for all schedules. `raise` ends the
        run.
    unconverged: the share; None: no share is too large.
    in_a_row: the run ends after this many failed steps in a row that had no effect (skipped) or are
        not finite; None: never. Unconverged steps that were made do not count: training on solves
        cut off at their step limit makes progress.
    unconverged_in_a_row: the run ends after this many failed steps in a row of whatever kind, those
        too; None: never.
    patience: `warn` reports, and keeps a step, when this many in a phase have not converged: the
        first solves of an untrained cell often do not, and soon do. What is not finite is reported
        at once.

    The first step that is reported is kept in failure.ckpt, to be run again by `mode=replay`; the
    first one that is not finite replaces it.

    The verdict is that of all processes together, and the same on all: 13 numbers of each are sent
    with the averaged gradients (`PayloadDDPStrategy`). With `warn` they are read one step late, so
    that no device is waited for; otherwise once per step, after the backward pass. Accumulated
    gradients make one step of several batches, which is judged, counted and kept as a whole. An
    optimizer that evaluates its batch several times in a step (LBFGS) is judged by the first
    evaluation.

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
        # What ends the run is kept, and so it must have been reported by then.
        self.patience = min(patience, unconverged_in_a_row or patience)
        self._record = _Record()
        self._tensors: _Tensors | None = None
        self._pending: list[tuple[StepResult, Reading]] = []  # of all processes, not yet read

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the module's tensors; nothing is left of an earlier training."""
        self._tensors, self._pending = _Tensors(pl_module), []

    def begin(self, trainer: Trainer) -> dict[str, Tensor]:
        """Copies of the tensors that the step may have changed by the time it is judged.

        Raises: TrainingFailed if the run that is resumed had come to its end.
        """
        self._stop_if_hopeless(trainer)
        assert self._tensors is not None
        changing: dict[str, Tensor] = {}
        if self.on_failure != "warn":
            changing = self._tensors.buffers()
        elif not self._record.final:
            changing = {**self._tensors.named, **self._tensors.buffers()}
        return {name: tensor.clone() for name, tensor in changing.items()}

    def random_state(self) -> tuple[Any, ...] | None:
        """The random numbers before a batch; None if no further step will be kept."""
        return None if self._record.final else taken_random_state()

    def judge(self, step: StepResult, trainer: Trainer, module: LightningModule) -> bool:
        """Whether to skip the optimizer in this step, after its backward pass on all processes.

        Raises: TrainingFailed.
        """
        if self.on_failure == "warn":  # the step before
            self._judge_pending(trainer, module)
        self._pending.append((step, self._reading(step, trainer)))
        failed = False
        if self.on_failure != "warn":
            failed = self._judge_pending(trainer, module)
        self._stop_if_hopeless(trainer)
        skips = failed and self.on_failure == "skip_step"
        if skips:
            assert self._tensors is not None
            self._tensors.restore(step.before)
        return skips

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last step, and end the phase that it may be in.

        Raises: TrainingFailed.
        """
        self._judge_pending(trainer, pl_module)
        self._end_phase(trainer)
        self._stop_if_hopeless(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Judge the step before the one in which something else has ended the run; on one process
        alone, since others may not come to this point.
        """
        if trainer.world_size == 1:
            with suppress(RuntimeError):  # of a device that has failed, too
                self._judge_pending(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what later steps depend on, including the step before this moment."""
        self._judge_pending(trainer, pl_module)
        checkpoint[VERDICT] = asdict(self._record)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore it."""
        saved = dict(checkpoint.get(VERDICT, {}))
        if "told" in saved:  # of an earlier version
            saved["reported"] = saved.pop("told")
        self._record = _Record(**saved)

    def _reading(self, step: StepResult, trainer: Trainer) -> Reading:
        """The measures of a step on all processes, with the norm of its gradients."""
        assert self._tensors is not None
        rows = step.measures()[None]
        if (strategy := payload_strategy(trainer)) is not None:
            gathered = strategy.gathered(VERDICT)
            assert gathered is not None  # gradients have been averaged
            rows = gathered
        # A scaler (16-mixed) deals with gradients that its scale has made infinite.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        return Reading(with_norm(rows, [] if scaled else self._tensors.gradients()))

    def _judge_pending(self, trainer: Trainer, module: LightningModule) -> bool:
        """Judge the steps that have not been, on all processes together; whether one failed.

        Raises: TrainingFailed, with `raise`.
        """
        pending, self._pending = self._pending, []
        failed = [each for each in pending if self._fails(*each, trainer, module)]
        return bool(failed)

    def _fails(
        self, step: StepResult, reading: Reading, trainer: Trainer, module: LightningModule
    ) -> bool:
        """Judge a step, and report and keep it if that is due.

        Raises: TrainingFailed, with `raise`.
        """
        diagnosis = Diagnosis.of(reading.rows())
        failed, number = diagnosis.failed(self.unconverged), step.number
        self._count(failed, diagnosis)
        if not failed:
            self._cool_down(number, trainer)
        elif self._is_due(number, diagnosis):
            self._keep(step, diagnosis, trainer, module)
            self._report(number, diagnosis, trainer)
        return failed

    def _count(self, failed: bool, diagnosis: Diagnosis) -> None:
        """Count the steps in a row that had no effect, and those that failed."""
        effective = not failed or (self.on_failure == "warn" and diagnosis.finite)
        rows = self._record.rows
        for name, counts in (("in_a_row", not effective), ("unconverged_in_a_row", failed)):
            count, cause = rows.pop(name, (0, ""))
            if counts:
                cause = cause or f"{diagnosis.symptom}; what helps: {diagnosis.advice}"
                rows[name] = [count + 1, cause]

    def _is_due(self, number: int, diagnosis: Diagnosis) -> bool:
        """Add a failed step to its phase; whether it is reported, now or already."""
        first, _, count = self._record.phase or (number, number, 0)
        self._record.phase = [first, number, count + 1]
        waits = self.on_failure == "warn" and diagnosis.finite
        return bool(self._record.reported) or not waits or count + 1 >= self.patience

    def _keep(
        self, step: StepResult, diagnosis: Diagnosis, trainer: Trainer, module: LightningModule
    ) -> None:
        """Keep the first step that is reported, and then the first that is not finite."""
        record = self._record
        if record.kept is not None and (record.final or diagnosis.finite):
            return
        record.kept, record.final = step.number, not diagnosis.finite
        save_failure(step, diagnosis, trainer, module)

    def _report(self, number: int, diagnosis: Diagnosis, trainer: Trainer) -> None:
        """Log a line when a phase begins, and one when it turns non-finite.

        Raises: TrainingFailed, with `raise`.
        """
        kind = 1 if diagnosis.finite else 2
        helps = f"what helps: {diagnosis.advice}"
        line = f"step {number:,}: {diagnosis.symptom}; {helps}; {self._replay(trainer)}"
        if self.on_failure == "raise":
            raise TrainingFailed(line)
        if trainer.is_global_zero and kind > self._record.reported:
            log.warning("%s", line)
        self._record.reported = max(kind, self._record.reported)

    def _cool_down(self, number: int, trainer: Trainer) -> None:
        """After a step that did not fail."""
        if self._record.phase and number - self._record.phase[1] >= _COOLDOWN:
            self._end_phase(trainer)

    def _end_phase(self, trainer: Trainer) -> None:
        phase, reported = self._record.phase, self._record.reported
        self._record.phase, self._record.reported = [], 0
        if not reported or not trainer.is_global_zero:
            return
        first, last, count = phase
        if last > first:  # a single step has been reported in full
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
        command = f"{typed('train')} mode=replay from_run={trainer.default_root_dir}"
        return f"step {self._record.kept:,} again: {command}"
