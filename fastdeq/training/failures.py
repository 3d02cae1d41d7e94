"""Training steps that fail are reported, skipped, or end the run; the first one is kept."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import torch
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
"""The name of the payload that a verdict needs, and of the verdict's state in a checkpoint."""

_COOLDOWN = 100  # good steps that end a phase of failing ones: at most two lines per 100 steps


class TrainingFailed(RuntimeError):
    """A training step failed, or many in a row did, and ends the run."""


class _Tensors:
    """The tensors of a module, collected once, since walking through submodules takes time."""

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


class _Copies:
    """Copies of tensors, in memory that is used again for the next copies but one: a step is judged
    when the next one has begun.
    """

    def __init__(self) -> None:
        self._newest: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._newest, self._before = self._before, self._newest
        if not _alike(self._newest, tensors):  # the first ones, or a module has replaced a buffer
            self._newest = {name: torch.empty_like(each) for name, each in tensors.items()}
        if tensors:
            torch._foreach_copy_(list(self._newest.values()), list(tensors.values()))
        return self._newest


def _alike(copies: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    return copies.keys() == tensors.keys() and all(
        (copy.shape, copy.dtype, copy.device) == (each.shape, each.dtype, each.device)
        for copy, each in zip(copies.values(), tensors.values(), strict=True)
    )


@dataclass
class _Record:
    """The state that later steps depend on, and that a resumed run restores."""

    kept: int | None = None  # the number of the step in failure.ckpt
    final: bool = False  # no later step replaces it
    rows: dict[str, list[Any]] = field(default_factory=dict)
    """For each setting that may end the run: the length of the current row of steps that it counts,
    and what was wrong with the first of them."""
    phase: list[int] = field(default_factory=list)  # first step, last failed step, number of failed
    reported: int = 0  # in this phase: unconverged solves (1), a non-finite step (2)


class Failures(Callback):
    """The verdict on a training step, between its backward pass and the optimizer.

    A step fails if more than a share of its samples do not converge in the forward or in the
    backward solve, or if its loss or the norm of its gradient is not finite. Steps of pretraining
    do not solve, so only the second condition applies to them.

    on_failure: `warn` reports the beginning and the length of a phase of failing steps.
        `skip_step` also skips the optimizer: parameters, the optimizer's state and running
        statistics do not change, but the step counts for all schedules. `raise` ends the run.
    unconverged: the share; None: no limit.
    in_a_row: the run ends after this many failed steps in a row that were skipped or not finite;
        None: never. Unconverged steps that were not skipped do not count, since training on solves
        that end at their step limit makes progress.
    unconverged_in_a_row: the run ends after this many failed steps of any kind in a row; None:
        never.
    patience: `warn` reports and keeps an unconverged step only when a phase has this many: the
        first solves of an untrained cell often do not converge, and soon do. A non-finite step is
        reported at once.

    The first reported step is kept in failure.ckpt for `mode=replay`; the first non-finite one
    replaces it.

    All processes reach the same verdict, from 13 numbers of each that are sent with the averaged
    gradients (`PayloadDDPStrategy`). `warn` reads them one step later, so that it does not wait for
    the device; the other choices read them once per step, after the backward pass. With accumulated
    gradients, a step of several batches is judged, counted and kept as a whole. An optimizer that
    evaluates its batch several times per step (LBFGS) is judged by the first evaluation.

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
        # A step that ends the run must have been reported and kept before.
        self.patience = min(patience, unconverged_in_a_row or patience)
        self._record = _Record()
        self._tensors: _Tensors | None = None
        self._copies = _Copies()
        self._pending: list[tuple[StepResult, Reading]] = []  # of all processes, not yet read

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the module's tensors, and forget an earlier training."""
        self._tensors, self._copies, self._pending = _Tensors(pl_module), _Copies(), []

    def begin(self, trainer: Trainer) -> dict[str, Tensor]:
        """Copies of the tensors that the step may change before it is judged, valid until the next
        step but one begins.

        Raises: TrainingFailed if the resumed run had reached its limit of failed steps.
        """
        self._stop_if_hopeless(trainer)
        assert self._tensors is not None
        changing: dict[str, Tensor] = {}
        if self.on_failure != "warn":
            changing = self._tensors.buffers()
        elif not self._record.final:
            changing = {**self._tensors.named, **self._tensors.buffers()}
        return self._copies.of(changing)

    def random_state(self) -> tuple[Any, ...] | None:
        """The random state before a batch; None if no further step will be kept."""
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
        """Judge the last step, and end the current phase.

        Raises: TrainingFailed.
        """
        self._judge_pending(trainer, pl_module)
        self._end_phase(trainer)
        self._stop_if_hopeless(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Judge the step before an exception; only on a single process, since others may not reach
        this point.
        """
        if trainer.world_size == 1:
            with suppress(RuntimeError):  # of a device that has failed, too
                self._judge_pending(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state that later steps depend on, with the verdict on the last step."""
        self._judge_pending(trainer, pl_module)
        checkpoint[VERDICT] = asdict(self._record)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore that state."""
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
        """Judge the pending steps; return whether one failed.

        Raises: TrainingFailed, with `raise`.
        """
        pending, self._pending = self._pending, []
        failed = [each for each in pending if self._fails(*each, trainer, module)]
        return bool(failed)

    def _fails(
        self, step: StepResult, reading: Reading, trainer: Trainer, module: LightningModule
    ) -> bool:
        """Judge a step; report and keep it if that is due.

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
        """Add a failed step to its phase; return whether the phase is reported."""
        first, _, count = self._record.phase or (number, number, 0)
        self._record.phase = [first, number, count + 1]
        waits = self.on_failure == "warn" and diagnosis.finite
        return bool(self._record.reported) or not waits or count + 1 >= self.patience

    def _keep(
        self, step: StepResult, diagnosis: Diagnosis, trainer: Trainer, module: LightningModule
    ) -> None:
        """Keep the first reported step, then the first non-finite one."""
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
        """The command that replays the kept step."""
        command = f"{typed('train')} mode=replay from_run={trainer.default_root_dir}"
        return f"step {self._record.kept:,} again: {command}"
