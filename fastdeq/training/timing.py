"""The time of training steps, and what it is spent on."""

import math
import statistics
import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Timer
from torch.utils.hooks import RemovableHandle

from fastdeq.nn import DEQChain
from fastdeq.timer import Seconds, Stopwatch
from fastdeq.training.step import StepResult
from fastdeq.training.task import AbstractTask

_WARM_UP = 5  # steps that allocate and tune; not in the median
_EVERY = 20  # steps from one sampled step to the next


class StepTimer(Callback):
    """Measures each optimizer step with the device's clock: forward and backward passes of its
    batches, and the optimizer. Every 20th step it also measures the evaluations of the cell
    (`shares`). Only reading the results waits for the device.
    """

    def __init__(self) -> None:
        self._steps: list[Seconds] = []
        self._seen = 0
        self._sample: _Sample | None = None  # of the current step
        self._unread: _Sample | None = None  # of an earlier step
        self._parts = dict.fromkeys((*_PARTS, "total"), 0.0)
        self._compiled = False
        self.first_start: float | None = None
        """`time.perf_counter` at the start of the first step; None before."""

    @property
    def seconds(self) -> list[float]:
        """Seconds of every step after the warm-up; waits for the device."""
        return [float(total) for total in self._steps]

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds per step after the warm-up; None without such steps."""
        return 1000 * statistics.median(self.seconds) if self._steps else None

    @property
    def seconds_per_step(self) -> float | None:
        """Wall-clock seconds per optimizer step so far in this process, with everything between
        the steps; None before the first one ends.
        """
        if self.first_start is None or not self._seen:
            return None
        return (time.perf_counter() - self.first_start) / self._seen

    @property
    def shares(self) -> dict[str, float] | None:
        """The shares of the training time, from one step to the next, over the sampled steps; None
        without such steps. Waits for the device.

        f: evaluations of the cell in forward passes; not told apart from the solver in compiled
        solves, and then left out. solver: the rest of the forward solves.
        adjoint: the backward solves, with their products with the Jacobian of f. other: everything
        else (other layers, optimizer, metrics, loading of batches), without evaluation epochs.
        """
        self._read()
        total = self._parts["total"]
        if not total:
            return None
        shares = {name: max(0.0, self._parts[name]) / total for name in _PARTS}
        if self._compiled:
            del shares["f"]
        return {**shares, "other": max(0.0, 1 - sum(shares.values()))}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the start of the first step; measure the cell in a sampled one."""
        if self.first_start is None:
            self.first_start = time.perf_counter()
        if self._sample is not None:
            if batch_idx == 0:  # an evaluation epoch may lie before it
                self._sample.watch = Stopwatch(pl_module.device)
            self._sample.begin()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        """End the measurement of the cell: later evaluations are the adjoint's."""
        if self._sample is not None:
            self._sample.end()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the seconds of a completed step."""
        step: StepResult | None = outputs["step"]
        if step is None:
            return
        self._seen += 1
        if self._seen > _WARM_UP:
            self._steps.append(step.seconds)
        if self._sample is not None:
            self._read()
            self._unread, self._sample = self._sample.completed(step), None
        if self._seen % _EVERY == _WARM_UP and isinstance(pl_module, AbstractTask):
            self._sample = _Sample(pl_module.model, pl_module.device)
            self._compiled = self._sample.compiled

    def _read(self) -> None:
        """Add the seconds of the unread sample; its step is long over, or training is."""
        if self._unread is not None:
            for name, seconds in self._unread.parts().items():
                self._parts[name] += seconds
            self._unread = None


def seconds_left(trainer: Trainer, task: AbstractTask) -> float | None:
    """The seconds until the training ends, at its pace so far; None if that is not known yet. It
    may end earlier, by a callback.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # run time
    timers = [each for each in callbacks if isinstance(each, StepTimer)]
    pace = timers[0].seconds_per_step if timers else None
    if pace is None:
        return None
    limits = [each.time_remaining() for each in callbacks if isinstance(each, Timer)]
    steps = steps_of_run(trainer, task) - trainer.global_step
    left = min(pace * steps, *(limit for limit in limits if limit is not None), math.inf)
    return max(0.0, left) if math.isfinite(left) else None


def steps_of_run(trainer: Trainer, task: AbstractTask) -> float:
    """The optimizer steps of the whole run; infinite if nothing limits them. Unlike Lightning's
    estimate it never loads data, which all processes would have to do together.
    """
    batches = float(trainer.num_training_batches) / task.accumulate_grad_batches
    per_epoch = math.ceil(batches) if math.isfinite(batches) else batches
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    return min(per_epoch * epochs, math.inf if trainer.max_steps == -1 else trainer.max_steps)


_PARTS = ("f", "solver", "adjoint")


class _Sample:
    """The parts of one step, measured from the end of the step before it.

    watch: of the whole. compiled: whether a solve is: its cell is then not measured, since a hook
        would compile the solve again.
    """

    def __init__(self, model: DEQChain, device: torch.device) -> None:
        self.watch = Stopwatch(device)
        solvers = [getattr(layer, "solver", None) for layer in model.equilibria]
        self.compiled = any(solver is not None and solver.compile for solver in solvers)
        self._cells = [] if self.compiled else [layer.cell for layer in model.equilibria]
        self._device = device
        self._hooks: list[RemovableHandle] = []
        self._solving: list[Stopwatch] = []  # evaluations without a graph
        self._others: list[Stopwatch] = []
        self._step: StepResult | None = None

    def begin(self) -> None:
        running: list[Stopwatch] = []

        def before(*_: Any) -> None:
            running.append(Stopwatch(self._device))

        def after(*_: Any) -> None:
            kind = self._others if torch.is_grad_enabled() else self._solving
            kind.append(running.pop().stop())

        for cell in self._cells:
            self._hooks += [
                cell.register_forward_pre_hook(before),
                cell.register_forward_hook(after),
            ]

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def completed(self, step: StepResult) -> "_Sample":
        self.watch.stop()
        self._step = step
        return self

    def parts(self) -> dict[str, float]:
        """Seconds by name; `solver` is without f."""
        assert self._step is not None
        solve, adjoint = (
            sum(float(batch.seconds.get(name, 0.0)) for batch in self._step.batches)
            for name in ("solve_seconds", "backward_seconds")
        )
        solving, others = (sum(map(float, each)) for each in (self._solving, self._others))
        # An unrolled solve has a graph; of other solves, what has a graph comes before or after.
        inside = solving or min(others, solve)
        return {
            "f": solving + others,
            "solver": solve - inside,
            "adjoint": adjoint,
            "total": self.watch.seconds,
        }
