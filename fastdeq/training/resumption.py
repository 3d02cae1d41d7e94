"""Saving the state of a run, and resuming from it bit for bit."""

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
from fastdeq.training.reuse import Reuse
from fastdeq.training.task import AbstractTask

_KEY = "fastdeq"
_STOP_AFTER = 1  # code of this reason to stop; a signal has this plus its number


@dataclass(frozen=True)
class _Position:
    """The position of a run in its data after a step, before the next batch is fetched: the states
    of the loop, its loader and the data module, in the form of a checkpoint.
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
    """Saves the state that the rest of a run depends on in resume.ckpt; the previous state is kept
    as resume.before.ckpt.

    A process that continues from the state (`Trainer.fit(ckpt_path=…)`) does exactly what the first
    one would have done. In addition to Lightning's checkpoint, the state has the random state of
    every process, the sums of the epoch's metrics, and the number of rows of metrics.csv that
    belong to it. It is saved between two optimizer steps, never while gradients are accumulated
    (Lightning 2530, 17903): at the start of the next batch or epoch, after the hooks of all
    callbacks, their logging, and an evaluation within the epoch (Lightning pull 5731). This must be
    the first of the trainer's callbacks.

    minutes: between two saved states; None: not by the clock.
    steps: optimizer steps between two saved states; None: not by steps.
    stop_after: seconds after which the run saves its state and raises `Interrupted`, at the end of
        an optimizer step; None: never.

    `stop_request` is a function that returns the name of the signal that requests a stop, or None.
    If one of several processes receives a request, all stop after the same step: its request is
    sent with the averaged gradients of a step (`PayloadDDPStrategy`), and the next one is the last.

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
        """Seconds of training in the processes that this one continues."""
        self.metrics: dict[str, float] = {}
        """The metrics logged last when the state was saved: those of the previous epoch."""
        self._born = self._began = self._saved = time.monotonic()
        self._restored: dict[str, Any] | None = None  # until the first step
        self._requests: Reading | None = None  # of all processes, from the previous step
        self._due: _Position | None = None  # the position of a state that is due to be saved
        self._saving: _Position | None = None  # that of the state that is being saved
        self._stop = 0  # the reason to stop after saving; 0: none

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the timers.

        Raises: Interrupted for a SIGTERM that Lightning's handler has received.
        """
        if trainer.received_sigterm:
            raise Interrupted("stopped before its first step by SIGTERM")
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
        """Save, and stop, if that is due. Before the first step of a resumed run, restore the
        random state and the sums of the metrics.

        Raises: Interrupted.
        """
        if self._due is not None:
            self.save(trainer)
        if self._restored is not None:
            state, self._restored = self._restored, None
            _restore(state["ranks"], trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and stop, if that is due since the last step of the previous epoch.

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
            # The seal moves last: a file without a seal is not trusted.
            newest, before = folder / RESUME, folder / BEFORE
            seal_of(before).unlink(missing_ok=True)
            newest.replace(before)
            if seal_of(newest).exists():
                seal_of(newest).replace(seal_of(before))
        self._saving, self._due = self._due, None
        try:
            trainer.save_checkpoint(folder / RESUME)
        finally:
            self._saving = None
        self._saved = time.monotonic()
        if self._stop:
            count = trainer.global_step
            steps = "1 step" if count == 1 else f"{count:,} steps"
            raise Interrupted(f"stopped after {steps} by {_named(self._stop)}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state that Lightning does not keep; on all processes, since each has its own."""
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
        if self._saving is not None:  # not into the other checkpoints of the run
            self._saving.put_into(checkpoint)
            for each in trainer.callbacks:  # type: ignore[attr-defined]  # run time
                checkpoint.update(each.saved() if isinstance(each, Reuse) else {})

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore that state; the random state follows at the first step."""
        _upgrade(checkpoint)
        for state in checkpoint.get("callbacks", {}).values():
            if "best_k_models" in state:
                _move(state, Path(trainer.default_root_dir).resolve())
        self._restored = checkpoint[_KEY]
        self.seconds_before = checkpoint[_KEY]["seconds"]
        self.metrics = dict(checkpoint[_KEY]["metrics"])

    def _request(self) -> tuple[int, bool]:
        """The reason to stop (0: none), and whether it is time to save."""
        now = time.monotonic()
        save = self.minutes is not None and now - self._saved >= 60 * self.minutes
        if name := self.stop_request():
            return _STOP_AFTER + signal.Signals[name], save
        late = self.stop_after is not None and now - self._born >= self.stop_after
        return _STOP_AFTER if late else 0, save

    def _agreed(self, trainer: Trainer) -> tuple[int, bool]:
        """The request of this process, or of any of several; the same on all processes."""
        if (strategy := payload_strategy(trainer)) is None:
            return self._request()
        if (sent := strategy.gathered(_KEY)) is None:
            return 0, False
        # Requests of the previous step: reading those of this step would wait for the device.
        before, self._requests = self._requests, Reading(sent)
        stops, saves = zip(*before.rows(), strict=True) if before else ((0,), (0,))
        return round(max(stops)), any(saves)


def _move(state: dict[str, Any], folder: Path) -> None:
    """Let a ModelCheckpoint find its files in `folder`: the run was moved, or is extended there."""
    state["dirpath"] = str(folder)
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if path := state.get(key):
            state[key] = str(folder / Path(path).name)
    scores = state["best_k_models"].items()
    state["best_k_models"] = {str(folder / Path(path).name): score for path, score in scores}


def _upgrade(checkpoint: dict[str, Any]) -> None:
    """Convert a state of a version that used Lightning's automatic optimization."""
    state = checkpoint[_KEY]
    if "figures" not in state:
        return
    state["metrics"] = state.pop("figures")
    loop = checkpoint["loops"]["fit_loop"]
    done = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    loop["epoch_loop.manual_optimization.optim_step_progress"] = done


def _end_restart(trainer: Trainer) -> None:
    """End Lightning's restarting state in a run that resumes at the start of an epoch.

    Otherwise Lightning would count the batches of the previous epoch for this one.
    """
    loop = trainer.fit_loop
    loop._restarting = loop.epoch_loop._restarting = False
    epochs = loop.epoch_progress.current
    epochs.ready = epochs.completed + 1  # Lightning does not count one resumed at its start


def _named(stop: int) -> str:
    return "stop_after" if stop == _STOP_AFTER else signal.Signals(stop - _STOP_AFTER).name


def rows_of(checkpoint: dict[str, Any]) -> int:
    """The number of rows of metrics.csv that belong to a saved state."""
    return int(checkpoint[_KEY]["rows"])


def _restore(ranks: list[dict[str, Any]], trainer: Trainer, pl_module: LightningModule) -> None:
    """Restore this process's part. If the number of processes has changed, the first one takes all
    sums, and a process without a random state in `ranks` keeps its own.
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
