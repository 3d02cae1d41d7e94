"""One run, on each of its processes: seed, build, fit, test, record.

Everything here works from a plain, resolved configuration. A process that trains never composes
one, so that nothing (a sweep, the time in a name) differs between ranks.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from hydra.utils import instantiate
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from omegaconf import OmegaConf
from pytorch_lightning.core.hooks import ModelHooks
from pytorch_lightning.loggers import Logger

import fastdeq
from fastdeq.experiment.announcements import announce, conclude
from fastdeq.experiment.build import STEP, build_data, build_task
from fastdeq.experiment.checkpoint import load_weights
from fastdeq.experiment.lightning_messages import hear_lightning
from fastdeq.experiment.rendezvous import current_step
from fastdeq.experiment.signals import received
from fastdeq.runs.files import remove_sealed, write_json
from fastdeq.runs.folder import BEFORE, RESUME, SUMMARY
from fastdeq.runs.provenance import peak_memory, provenance
from fastdeq.runs.reading import FORMAT
from fastdeq.training import (
    AbstractTask,
    EpochLines,
    ExtendedSchedule,
    KeepSigtermHandler,
    LoggerPlots,
    MetricsFile,
    ProgressBar,
    Resumption,
    SealedCheckpointIO,
    ShowsPlots,
    StepTimer,
    checkpoints,
    rows_of,
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The description of a run for its processes; picklable.

    config: resolved, plain containers. checkpoint: initial weights. resume: the saved state to
    resume from. choices: of the configuration's groups. reference: the published row of this run,
    if there is one. interactive: with a progress bar. prefix: of the lines on the console, which
    other runs share. started: `time.time` at the start of the command.
    """

    config: dict[str, Any]
    folder: Path
    command: str
    checkpoint: Path | None = None
    resume: Path | None = None
    choices: dict[str, str] = field(default_factory=dict)
    reference: dict[str, Any] | None = None
    ranks: int = 1
    interactive: bool = False
    prefix: str = ""
    started: float = field(default_factory=time.time)


def work(job: Job) -> None:
    """Run the job as the rank that the environment gives; rank 0 writes the summary.

    Raises: the errors of the parts; Interrupted if the run has saved its state to resume later.
    """
    cfg = job.config
    lightning.seed_everything(cfg["seed"], workers=True, verbose=False)
    made = OmegaConf.create(cfg)
    data, task = build_data(made), build_task(made)
    if job.checkpoint is not None:
        load_weights(task, job.checkpoint)
    rank = _rank()
    timer = StepTimer()
    loggers = _make_loggers(cfg, job, rank)
    try:
        trainer = make_trainer(cfg, task, job, timer, loggers)
        if rank == 0:
            announce(
                task,
                trainer,
                folder=job.folder,
                resume=None if job.resume is None else job.resume.name,
                ranks=job.ranks,
                parameters=_count_parameters(task),
            )
        metrics = _run(job, trainer, task, data)
        if rank == 0:
            summary = _summary(job, trainer, task, timer, metrics)
            write_json(job.folder / SUMMARY, summary)
            conclude(summary, trainer, task, folder=job.folder, reference=job.reference)
            for name in (RESUME, BEFORE):  # a finished run does not resume
                remove_sealed(job.folder / name)
    finally:
        for logger in loggers:
            if close := getattr(logger, "close", None):
                close()


def _rank() -> int:
    step = current_step()
    return int(os.environ.get("LOCAL_RANK", 0)) if step is None else step.rank


def make_trainer(
    cfg: dict[str, Any],
    task: AbstractTask,
    job: Job | None = None,
    timer: StepTimer | None = None,
    loggers: list[Logger] | None = None,
) -> lightning.Trainer:
    """The trainer of the configuration; without a job, only to check that it can be built."""
    hear_lightning()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    # Explicit, since Lightning would guess from variables that a cluster sets for other purposes.
    slurm = current_step() is not None
    ranks = SLURMEnvironment(auto_requeue=False) if slurm else LightningEnvironment()
    plugins: list[Any] = [SealedCheckpointIO(), ranks]
    if job is not None:
        chosen = [instantiate(node) for node in (cfg.get("callbacks") or {}).values()]
        first = [each for each in chosen if isinstance(each, Resumption)]  # saves before a batch
        others = [each for each in chosen if not isinstance(each, Resumption)]
        for callback in first:
            callback.stop_request = received
        bar = [ProgressBar()] if job.interactive else []
        shows = any(isinstance(logger, ShowsPlots) for logger in loggers or ())
        options = {
            "logger": loggers,
            "callbacks": [
                *first,
                KeepSigtermHandler(),
                timer,
                EpochLines(cfg.get("progress_minutes")),
                *others,
                *([ExtendedSchedule()] if cfg.get("extend") else []),
                *checkpoints(job.folder, task),
                *([LoggerPlots()] if shows else []),
                *bar,
            ],
            "default_root_dir": job.folder,
            "enable_progress_bar": job.interactive,
        }
    trainer = instantiate(cfg["trainer"], _convert_="all", _partial_=True)
    if own := sorted(trainer.keywords.keys() & _OWN):
        raise ValueError(f"{own[0]} is given by fastdeq itself: leave it out")
    if callable(strategy := trainer.keywords.get("strategy")):
        # DDP walks through the graph in every step to find unused parameters.
        options["strategy"] = strategy(find_unused_parameters=task.leaves_parameters_unused)
    for name in STEP:  # of the task: Lightning accepts them for automatic optimization only
        trainer.keywords.pop(name, None)
    made: lightning.Trainer = trainer(**options, plugins=plugins)
    # Lightning broadcasts before every step, which waits for the device (Lightning 21487 requests
    # an option). Here a stop request is sent with the averaged gradients instead (Resumption).
    made.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    leave_out_empty_hooks(made, task)
    return made


def leave_out_empty_hooks(trainer: lightning.Trainer, task: AbstractTask) -> None:
    """Hide the hooks of a step that do nothing: calling and profiling them, five of every callback,
    takes longer than a small step's optimizer. Lightning calls what is callable.
    """
    for each in (task, *trainer.callbacks):  # type: ignore[attr-defined]  # set at run time
        base = lightning.Callback if isinstance(each, lightning.Callback) else ModelHooks
        for name in _STEP_HOOKS:
            if getattr(type(each), name) is getattr(base, name):
                setattr(each, name, None)


_STEP_HOOKS = (
    *("on_train_batch_start", "on_train_batch_end"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step"),
)


_OWN = {
    *("logger", "callbacks", "plugins", "default_root_dir"),
    *("enable_checkpointing", "enable_progress_bar"),
}
"""Arguments of the trainer that `make_trainer` sets, so that a configuration must not."""


def _make_loggers(cfg: dict[str, Any], job: Job, rank: int) -> list[Logger]:
    rows = 0
    if job.resume is not None and rank == 0:
        rows = rows_of(torch.load(job.resume, map_location="cpu", weights_only=True))
    loggers: list[Logger] = [MetricsFile(job.folder, rows=rows)]
    if rank == 0:
        for node in (cfg.get("logger") or {}).values():
            logger = instantiate(node)(save_dir=job.folder)
            logger.log_hyperparams(cfg)
            loggers.append(logger)
    return loggers


def _run(job: Job, trainer: lightning.Trainer, task: AbstractTask, data: Any) -> dict[str, float]:
    """Fit, if that is the mode, and test the last state; return all metrics of the last epoch."""
    metrics: dict[str, float] = {}
    if job.config["mode"] == "train":
        begin = time.perf_counter()
        trainer.fit(task, datamodule=data, ckpt_path=job.resume)
        metrics["train_seconds"] = time.perf_counter() - begin
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set at run time
            if isinstance(callback, Resumption):
                metrics["train_seconds"] += callback.seconds_before
                metrics |= callback.metrics
        metrics |= _epoch_metrics(trainer)
    trainer.test(task, datamodule=data, verbose=False)
    return metrics | _epoch_metrics(trainer)


def _epoch_metrics(trainer: lightning.Trainer) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if not name.startswith("step/")
    }


def _summary(
    job: Job,
    trainer: lightning.Trainer,
    task: AbstractTask,
    timer: StepTimer,
    metrics: dict[str, float],
) -> dict[str, Any]:
    seconds = metrics.pop("train_seconds", None)
    first = timer.first_start
    # Two clocks: the start of the command is only known in `time.time`, which processes share.
    waited = None if first is None else time.time() - (time.perf_counter() - first) - job.started
    score = task.monitor[0]
    return {
        "format": FORMAT,
        "score": {"metric": f"test/{score}", "value": metrics[f"test/{score}"]},
        "metrics": metrics,
        "train_seconds": None if seconds is None else round(seconds, 3),
        "train_ms_per_step": timer.median_ms,
        "train_time_shares": _rounded(timer.shares),
        "seconds_to_first_step": None if waited is None else round(waited, 3),
        "peak_memory_bytes": peak_memory(trainer.strategy.root_device),
        "mode": job.config["mode"],
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "parameters": _count_parameters(task),
        "seed": job.config["seed"],
        "devices": job.ranks,
        "name": job.config["name"],
        "choices": job.choices,
        "reference": job.reference,
        **provenance(trainer.strategy.root_device, job.command, fastdeq.__version__),
    }


def _rounded(shares: dict[str, float] | None) -> dict[str, float] | None:
    return None if shares is None else {name: round(share, 4) for name, share in shares.items()}


def _count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
