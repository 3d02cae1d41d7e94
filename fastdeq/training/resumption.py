"""Runs that are interrupted, and resume bit for bit."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer

from fastdeq.runs.files import seal_of
from fastdeq.runs.folder import BEFORE, RESUME
from fastdeq.runs.status import Interrupted
from fastdeq.training.ddp import payload_strategy
from fastdeq.training.diagnosis import Reading
from fastdeq.training.loggers.metrics_file import MetricsFile
from fastdeq.training.random_state import gathered, random_state, set_random_state
from fastdeq.training.task import AbstractTask

_KEY = "fastdeq"
_STOP_AFTER = 1  # as a reason to stop; that of a signal is its number above


@dataclass(frozen=True)
class _Position:
    """Where a run is in its data after a step, before the next batch is fetched: the states of the
    loop, of its loader and of the data module, as a checkpoint has them.
    """

    loop: dict[str, Any]
    data: dict[str, Any]

    @classmethod
    def of(cls, trainer: Trainer) -> "_Position":
        data: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
        states = {} if data is None else {type(data).__qualname__: data.state_dict()}
        return cls(trainer.fit_loop.state_dict(), states)

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loops"]["fit_loop"] = self.loop
        checkpoint.update(self.data)


class Resumption(Callback):
    """Save everything that the rest of a run depends on, now and then, in resume.ckpt; the one
    before it stays as resume.before.ckpt.

    A process that continues from it (`Trainer.fit(ckpt_path=…)`) does exactly what the first one
    would have done: beside what Lightning keeps, the state has the random numbers of every process,
    the sums of the epoch's metrics, and how much of metrics.csv belongs to it. It is saved between
    two optimizer steps, never while gradients are accumulated (Lightning 2530, 17903): at the start
    of the batch or epoch that follows, when all that belongs to the step has been done, the hooks
    of all callbacks, what they log, and an evaluation within the epoch (Lightning pull 5731). The
    first of the trainer's callbacks has to be this one.

    minutes: between two of them; None: not by the clock. steps: likewise, optimizer steps.
    stop_after: seconds after which the run saves its state and raises `Interrupted`, at the end of
    an optimizer step; None: never.

    stop_request: a function that returns the name of the signal that requests a stop, or None.
    Several processes do what any of them requests, all after the same step: the one after that in
    which its request has been sent with the averaged gradients (`PayloadDDPStrategy`).

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
        self.stop_request: Callable[[], str | None] = lambda: None
        self.seconds_before = 0.0
        """Of training, in the processes that this one continues."""
        self.metrics: dict[str, float] = {}
        """The metrics logged last when the state was saved: of the epoch before."""
        self._born = self._began = self._saved = time.monotonic()
        self._restored: dict[str, Any] | None = None  # until the first step
        self._requests: Reading | None = None  # of all processes, of the step before
        self._due: _Position | None = None  # a state is to be saved, of this position
        self._stop = 0  # why the run then stops; 0: it does not

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks.

        Raises: Interrupted for a SIGTERM that Lightning's handler has received.
        """
        if trainer.received_sigterm:
            raise Interrupted("stopped before its first step, as SIGTERM says")
        self._began = self._saved = time.monotonic()
        self._requests, self._due, self._stop = None, None, 0
        if (strategy := payload_strategy(trainer)) is not None:
            strategy.register(_KEY, lambda: torch.tensor(self._request(), dtype=torch.float32))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an optimizer step, decide whether to save and whether to stop."""
        if outputs["step"] is None:
            return
        self._stop, save = self._agreed(trainer)
        by_steps = self.steps is not None and trainer.global_step % self.steps == 0
        if self._stop or save or by_steps:
            self._due = _Position.of(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save, and stop, if that is due. Before the first step of a resumed run: restore the
        random numbers and the sums of the metrics.

        Raises: Interrupted.
        """
        if self._due is not None:
            self.save(trainer)
        if self._restored is not None:
            state, self._restored = self._restored, None
            _restore(state["ranks"], trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and stop, if that is due since the last step of the epoch before.

        Raises: Interrupted.
        """
        if self._due is not None:
            self._due = _Position.of(trainer)  # no batch of the epoch has been fetched
            self.save(trainer)
        if self._restored is not None:
            _end_restart(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write resume.ckpt, on all processes together.

        Raises: Interrupted if the run stops here.
        """
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero and (folder / RESUME).exists():
            # The seal goes last: a file without one is not trusted.
            newest, before = folder / RESUME, folder / BEFORE
            seal_of(before).unlink(missing_ok=True)
            newest.replace(before)
            if seal_of(newest).exists():
                seal_of(newest).replace(seal_of(before))
        trainer.save_checkpoint(folder / RESUME)
        self._saved, self._due = time.monotonic(), None
        if self._stop:
            count = trainer.global_step
            steps = "1 step" if count == 1 else f"{count:,} steps"
            raise Interrupted(f"stopped after {steps}, as {_named(self._stop)} says")

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
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if not name.startswith("step/")
        }
        checkpoint[_KEY] = {
            "ranks": gathered(mine, trainer),
            "rows": rows[0] if rows else 0,
            "metrics": {**self.metrics, **metrics},
            "seconds": self.seconds_before + time.monotonic() - self._began,
        }
        if self._due is not None:
            self._due.put_into(checkpoint)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore it; the random numbers at the first step."""
        _upgrade(checkpoint)
        self._restored = checkpoint[_KEY]
        self.seconds_before = checkpoint[_KEY]["seconds"]
        self.metrics = dict(checkpoint[_KEY]["metrics"])

    def _request(self) -> tuple[int, bool]:
        """Why to stop (0: not at all), and whether it is time to save."""
        now = time.monotonic()
        save = self.minutes is not None and now - self._saved >= 60 * self.minutes
        if name := self.stop_request():
            return _STOP_AFTER + signal.Signals[name], save
        late = self.stop_after is not None and now - self._born >= self.stop_after
        return _STOP_AFTER if late else 0, save

    def _agreed(self, trainer: Trainer) -> tuple[int, bool]:
        """The request of this process, or of any of several: the same on all."""
        if (strategy := payload_strategy(trainer)) is None:
            return self._request()
        if (sent := strategy.gathered(_KEY)) is None:
            return 0, False
        # Those of the step before: reading this one's would wait for the device.
        before, self._requests = self._requests, Reading(sent)
        stops, saves = zip(*before.rows(), strict=True) if before else ((0,), (0,))
        return round(max(stops)), any(saves)


def _upgrade(checkpoint: dict[str, Any]) -> None:
    """Of a version whose steps were Lightning's automatic optimization: bring the state into the
    form of this one.
    """
    state = checkpoint[_KEY]
    if "figures" not in state:
        return
    state["metrics"] = state.pop("figures")
    loop = checkpoint["loops"]["fit_loop"]
    done = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    loop["epoch_loop.manual_optimization.optim_step_progress"] = done


def _end_restart(trainer: Trainer) -> None:
    """The epoch of a run that resumes at its start is an epoch like any other from here on.

    While it restarts, Lightning takes the batches of the epoch before for its own.
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
    """This process's part. Another number of processes keeps the sums, which the first one takes;
    a process without random numbers in the state continues with its own.
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
