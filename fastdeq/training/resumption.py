"""Runs that are interrupted, and resume bit for bit."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from fastdeq.runs.files import seal_of
from fastdeq.training.ddp import carrying
from fastdeq.training.diagnosis import Reading
from fastdeq.training.loggers.metrics_file import MetricsFile
from fastdeq.training.random_state import gathered, random_state, set_random_state
from fastdeq.training.steps import completes_step
from fastdeq.training.task import AbstractTask

RESUME, BEFORE = "resume.ckpt", "resume.before.ckpt"
_KEY = "fastdeq"
_STOP_AFTER = 1  # as a reason to stop; that of a signal is its number above
_NOTHING = (0, False)  # no reason to stop, nothing to save


class Interrupted(Exception):
    """The run was told to end before its time, and has saved where it was."""


class Resumption(Callback):
    """Save everything that the rest of a run depends on, now and then, in resume.ckpt; the one
    before it stays as resume.before.ckpt.

    A process that continues from it (`Trainer.fit(ckpt_path=…)`) does exactly what the first one
    would have done: beside what Lightning keeps, the state has the random numbers of every process,
    the sums of the epoch's figures, and how much of metrics.csv belongs to it. Saved between two
    optimizer steps, never while gradients are accumulated (Lightning 2530, 17903): when everything
    that follows a step has been done, whatever the order of the callbacks (Lightning pull 5731).
    After the last step of an epoch, this is when the next epoch starts.

    minutes: between two of them; None: not by the clock. steps: likewise, optimizer steps.
    stop_after: seconds after which the run saves its state and raises `Interrupted`, at the end of
    an optimizer step; None: never.

    asked: may be set to a function that names the signal that asks the run to stop, or returns
    None. Several processes do what any of them wants, all after the same step: the one after that
    in which its wish has gone along with the averaged gradients (`CarryingDDP`).

    Raises: ValueError for values out of range.
    """

    def __init__(
        self,
        *,
        minutes: float | None = 5.0,
        steps: int | None = None,
        stop_after: float | None = None,
    ) -> None:
        for name, value in (("minutes", minutes), ("steps", steps), ("stop_after", stop_after)):
            if value is not None and not value > 0:
                raise ValueError(f"Resumption.{name} is {value}, but must be above 0, or null")
        self.minutes, self.steps, self.stop_after = minutes, steps, stop_after
        self.seconds_before = 0.0
        """Of training, in the processes that this one continues."""
        self.figures: dict[str, float] = {}
        """The figures logged last when the state was saved: of the epoch before."""
        self.asked: Callable[[], str | None] = lambda: None
        self._born = self._began = self._saved = time.monotonic()
        self._restored: dict[str, Any] | None = None
        self._wishes: Reading | None = None  # of all processes, on their way
        self._due = _NOTHING  # once everything that follows the step has been done

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._began = self._saved = time.monotonic()
        self._wishes, self._due = None, _NOTHING
        self._act_after_steps(trainer)
        if (strategy := carrying(trainer)) is not None:
            strategy.carry(_KEY, lambda: torch.tensor(self._wish(), dtype=torch.float32))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first step of a continued run: all random numbers as they were."""
        if self._restored is not None:
            state, self._restored = self._restored, None
            _restore(state["ranks"], trainer, pl_module)
            _end_restart(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an optimizer step, decide whether to save and whether to stop."""
        if completes_step(trainer):
            stop, save = self._agreed(trainer)
            by_steps = self.steps is not None and trainer.global_step % self.steps == 0
            self._due = stop, save or by_steps

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on what the last step of the epoch before has decided.

        Raises: Interrupted.
        """
        if self._due != _NOTHING:
            self._act(trainer)
        if self._restored is not None:
            _end_restart(trainer)

    def _act_after_steps(self, trainer: Trainer) -> None:
        """Let the loop act on a step's decision when all else that belongs to the step is done:
        the hooks of callbacks and of the task, what they log, and an evaluation within the epoch.
        """
        loop = trainer.fit_loop.epoch_loop
        plain = type(loop).on_advance_end

        def on_advance_end(data_fetcher: Any) -> None:
            plain(loop, data_fetcher)
            if loop.done or self._due == _NOTHING:
                return
            # A state that Lightning restarts after an evaluation counts its batch once more.
            counted = loop._should_check_val_fx(data_fetcher)
            loop._batches_that_stepped -= counted
            self._act(trainer)
            loop._batches_that_stepped += counted

        loop.on_advance_end = on_advance_end  # type: ignore[method-assign]

    def _act(self, trainer: Trainer) -> None:
        """Save, and end the run, as is due.

        Raises: Interrupted.
        """
        (stop, _), self._due = self._due, _NOTHING
        self.save(trainer)
        if stop:
            count = trainer.global_step
            steps = "1 step" if count == 1 else f"{count:,} steps"
            raise Interrupted(f"stopped after {steps}, as {_named(stop)} says")

    def save(self, trainer: Trainer) -> None:
        """Write resume.ckpt, on all processes together."""
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero and (folder / RESUME).exists():
            # The seal goes last: a file without one is not trusted.
            newest, before = folder / RESUME, folder / BEFORE
            seal_of(before).unlink(missing_ok=True)
            newest.replace(before)
            if seal_of(newest).exists():
                seal_of(newest).replace(seal_of(before))
        trainer.save_checkpoint(folder / RESUME)
        self._saved = time.monotonic()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not keep; on all processes, for each has numbers of its own."""
        mine = {"random": random_state(), "means": _means(pl_module)}
        rows = [
            logger.flush()
            for logger in trainer.loggers
            if isinstance(logger, MetricsFile) and trainer.is_global_zero
        ]
        figures = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if not name.startswith("step/")
        }
        checkpoint[_KEY] = {
            "ranks": gathered(mine, trainer),
            "rows": rows[0] if rows else 0,
            "figures": {**self.figures, **figures},
            "seconds": self.seconds_before + time.monotonic() - self._began,
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take it back; the random numbers wait for the first step."""
        self._restored = checkpoint[_KEY]
        self.seconds_before = checkpoint[_KEY]["seconds"]
        self.figures = dict(checkpoint[_KEY]["figures"])

    def _wish(self) -> tuple[int, bool]:
        """Why to stop (0: not at all), and whether it is time to save."""
        now = time.monotonic()
        save = self.minutes is not None and now - self._saved >= 60 * self.minutes
        if asked := self.asked():
            return _STOP_AFTER + signal.Signals[asked], save
        late = self.stop_after is not None and now - self._born >= self.stop_after
        return _STOP_AFTER if late else 0, save

    def _agreed(self, trainer: Trainer) -> tuple[int, bool]:
        """The wish of this process, or of any of several: the same on all."""
        if (strategy := carrying(trainer)) is None:
            return self._wish()
        if (arrived := strategy.arrived(_KEY)) is None:
            return 0, False
        # Those of the step before: to read this one's would wait for the device.
        before, self._wishes = self._wishes, Reading(arrived)
        stops, saves = zip(*before.rows(), strict=True) if before else ((0,), (0,))
        return round(max(stops)), any(saves)


def _end_restart(trainer: Trainer) -> None:
    """From here on, the epoch of a resumed run is one like any other.

    While it restarts, Lightning takes the batches of the epoch before for those of an epoch that is
    resumed at its start, and passes over ReduceLROnPlateau at the end.
    """
    loop = trainer.fit_loop
    loop._restarting = loop.epoch_loop._restarting = False
    epochs = loop.epoch_progress.current
    epochs.ready = epochs.completed + 1  # Lightning does not count one resumed at its start


def _named(stop: int) -> str:
    return "stop_after" if stop == _STOP_AFTER else signal.Signals(stop - _STOP_AFTER).name


def rows_of(checkpoint: dict[str, Any]) -> int:
    """How many rows of metrics.csv belong to a state that was saved."""
    return int(checkpoint[_KEY]["rows"])


def _restore(ranks: list[dict[str, Any]], trainer: Trainer, pl_module: LightningModule) -> None:
    """This process's share. Another number of processes keeps the sums, which the first one takes,
    and goes on with random numbers of its own where there are none for it.
    """
    rank, same = trainer.global_rank, len(ranks) == trainer.world_size
    if rank < len(ranks):
        set_random_state(ranks[rank]["random"])
    if not isinstance(pl_module, AbstractTask):
        return
    if same:
        pl_module.training_means.load(ranks[rank]["means"])
    elif rank == 0:
        parts = [each["means"] for each in ranks]
        pl_module.training_means.load({name: sum(p[name] for p in parts) for name in parts[0]})


def _means(pl_module: LightningModule) -> dict[str, torch.Tensor]:
    return pl_module.training_means.saved() if isinstance(pl_module, AbstractTask) else {}
