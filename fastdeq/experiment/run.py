"""From a composed configuration to a finished run folder."""

import copy
import os
import shlex
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastdeq.commands import typed
from fastdeq.data.module import AbstractDataModule
from fastdeq.experiment.build import build_data, build_model, build_task, link, predicts
from fastdeq.experiment.checkpoint import load_weights
from fastdeq.experiment.checks import check_division, check_sizes, check_values, count_ranks
from fastdeq.experiment.error_context import error_context
from fastdeq.experiment.explain import explain
from fastdeq.experiment.job import Job, make_trainer
from fastdeq.experiment.keys import RunSettings
from fastdeq.experiment.launch import interactive, launch
from fastdeq.experiment.optimization import check_optimizer, check_scheduler
from fastdeq.experiment.place import prefix
from fastdeq.experiment.signals import listening
from fastdeq.nn import DEQChain
from fastdeq.report import published_row
from fastdeq.runs.extending import begin_from, check_extension
from fastdeq.runs.files import write_json, write_text
from fastdeq.runs.folder import CONFIG, LAST, OVERRIDES, log_file, make_folder
from fastdeq.runs.identity import digest, identity
from fastdeq.runs.lock import run_lock
from fastdeq.runs.log import logging_to
from fastdeq.runs.reading import is_done, read_summary
from fastdeq.runs.resuming import check_same, same_run_beside, saved_state
from fastdeq.runs.status import created, recorded
from fastdeq.training import PlainDataModule, Reuse


def run(cfg: DictConfig) -> Path:
    """Check, train and test the run that `cfg` describes; return its folder.

    The folder, <paths.outputs>/<name>/<date and time>, holds the resolved configuration
    (config.yaml), the overrides it came from (overrides.json), the metrics of every epoch
    (metrics.csv), the states of the last epoch and of the best validation (last.ckpt, best.ckpt),
    what was printed (train.log), and summary.json: the final metrics and their provenance.

    If the folder is given (paths.run) and exists, its run is resumed from its last saved state. A
    finished run is left unchanged.

    Raises, before anything is written: ValueError, TypeError, OSError or Hydra's
    InstantiationException for settings, data or a checkpoint that cannot be used; FileExistsError
    for a folder with another run; BlockingIOError for a folder that another process uses. Later:
    Interrupted.
    """
    started = _started()
    checked = check(cfg)
    config, settings, identity = checked.config, checked.settings, checked.identity
    chosen = None if config["paths"]["run"] is None else Path(config["paths"]["run"])
    resumes = settings.resume == "auto" and settings.mode == "train"
    if chosen is None and resumes and HydraConfig.get().mode == RunMode.MULTIRUN:
        chosen = checked.folder_in_sweep
        if not chosen.exists():
            chosen = same_run_beside(chosen, config) or chosen
    folder = _folder(chosen, config, settings, identity, resumes=resumes)
    with run_lock(folder):
        if resumes and is_done(folder):
            print(f"{prefix()}done already: see {folder}")
            return folder
        with logging_to(log_file(folder, settings.mode), prefix()):
            resume = saved_state(folder)
        job = Job(
            config=config,
            folder=folder,
            command=_command(),
            checkpoint=checked.checkpoint,
            resume=resume,
            choices=checked.choices,
            reference=checked.reference,
            ranks=checked.ranks,
            interactive=interactive() and not prefix(),
            prefix=prefix(),
            started=started,
        )
        with listening(), recorded(folder, identity, explain):
            launch(job)
    return folder


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A configuration that can be run.

    config: resolved, plain containers. ranks: number of training processes on all nodes.
    checkpoint: initial weights. identity: a hash of the settings that the results depend on.
    choices: of the groups. reference: the published row of this run.
    """

    config: dict[str, Any]
    settings: RunSettings
    ranks: int
    checkpoint: Path | None
    identity: str
    choices: dict[str, str]
    reference: dict[str, Any] | None

    @property
    def folder_in_sweep(self) -> Path:
        """The folder in which a restarted sweep finds this run."""
        return Path(self.config["paths"]["outputs"]) / self.settings.name / self.identity


def check(cfg: DictConfig, *, for_submission: bool = False) -> Checked:
    """Check the values, and build everything once, which writes nothing but prepared data.

    for_submission: the run is for other machines, which may have other devices.

    Raises: as `run` does before anything is written.
    """
    settings = check_values(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    if settings.mode in ("replay", "curve"):
        raise ValueError(
            f"mode={settings.mode} does not make a run: call fastdeq.experiment.{settings.mode}"
        )
    if settings.extend is not None:
        check_extension(Path(settings.extend), config)
    ranks = count_ranks(config["trainer"], for_submission=for_submission)
    checkpoint, choices = initial_weights(settings), _choices()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run builds everything again and repeats the warnings
        _check_parts(cfg, None if for_submission else config, ranks, checkpoint)
    return Checked(
        config=config,
        settings=settings,
        ranks=ranks,
        checkpoint=checkpoint,
        identity=digest(identity(config)),
        choices=choices,
        reference=published_row(config, choices),
    )


def _folder(
    chosen: Path | None,
    config: dict[str, Any],
    settings: RunSettings,
    identity: str,
    *,
    resumes: bool,
) -> Path:
    """A new folder, or with `resumes` the chosen one as it is."""
    if chosen is not None and resumes:
        if not chosen.exists():
            # Made under another name and renamed: if several processes do this at the same time,
            # one of them makes the folder, and the others find it complete.
            place = chosen.with_name(f".{chosen.name}.{os.getpid()}")
            aside = make_folder(chosen.parent, settings.name, place)
            _describe(aside, config, identity)
            try:
                aside.rename(chosen)
            except OSError:
                shutil.rmtree(aside)
        check_same(chosen, config)
        return chosen
    folder = make_folder(Path(config["paths"]["outputs"]), settings.name, chosen)
    _describe(folder, config, identity)
    return folder


def _describe(folder: Path, config: dict[str, Any], identity: str) -> None:
    created(folder, identity)
    write_json(folder / OVERRIDES, list(HydraConfig.get().overrides.task))
    write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(config)))
    if config["extend"] is not None:
        begin_from(Path(config["extend"]), folder)


def read_score(folder: Path) -> float:
    """The score that a sweeper optimizes: test accuracy, or test loss of a regression."""
    return float(read_summary(folder)["score"]["value"])


def initial_weights(settings: RunSettings | DictConfig) -> Path | None:
    """The checkpoint whose weights a run begins with, or that mode=test evaluates."""
    if settings.checkpoint is not None:
        return Path(settings.checkpoint)
    if settings.mode == "test" and settings.from_run is not None:
        return Path(settings.from_run) / LAST
    return None


def _check_parts(
    cfg: DictConfig, config: dict[str, Any] | None, ranks: int, checkpoint: Path | None
) -> None:
    """Build everything once, so that errors are raised before a folder is made.

    config: for building a trainer; None builds none, since its devices may be missing here.
    """
    parts = copy.deepcopy(cfg)  # Hydra resolves it; the original keeps its interpolations
    cfg = link(cfg)
    for key in ("solver", "adjoint", "loss", "scheduler"):
        with error_context(cfg, key):
            instantiate(parts.get(key), _convert_="all")
    with error_context(cfg, "callbacks"):
        callbacks = instantiate(parts.get("callbacks"), _convert_="all") or {}
    with error_context(cfg, "data"):
        data = build_data(parts)
    check_division(data, ranks)
    with error_context(cfg, "model"):
        model = build_model(parts)
    _check_skip_loss(cfg, model)
    if any(isinstance(each, Reuse) for each in callbacks.values()):
        Reuse.check(model, ranks, data)
    with error_context(cfg, "task"):
        task = build_task(parts, model)
    with error_context(cfg, "optimizer"):
        task.make_optimizer(task.parameters())
        check_optimizer(task.make_optimizer, cfg.trainer, ranks)
    with error_context(cfg, "scheduler"):
        check_scheduler(task, cfg.trainer)
    if config is not None:
        with error_context(cfg, "trainer"):
            make_trainer(config, task)
    if isinstance(data, AbstractDataModule):
        check_sizes(cfg.sizes, data.input_shape, data.outputs)
    if checkpoint is not None:
        load_weights(task, checkpoint)
    with error_context(cfg, "data"):
        data.prepare_data()
        batch = data.sample_batch()
    if isinstance(data, PlainDataModule):
        check_sizes(cfg.sizes, tuple(batch.inputs.shape[1:]), None)
    with error_context(cfg, "model"):
        task.check_model(batch)


def _check_skip_loss(cfg: DictConfig, model: DEQChain) -> None:
    """Raises: ValueError for a typed skip loss if the model does not predict z₀. Skip losses of
    experiments, sweeps and earlier runs have no effect on such models.
    """
    hydra = HydraConfig.get()
    typed = any(word.lstrip("+").startswith("loss.skip=") for word in hydra.overrides.task)
    alone = hydra.mode != RunMode.MULTIRUN and cfg.from_run is None
    if typed and alone and cfg.loss.skip and not predicts(model):
        raise ValueError(
            f"loss.skip is {cfg.loss.skip}, but model={hydra.runtime.choices['model']} does not "
            "predict z₀: use a skip model (model=skip_deq), or leave loss.skip out"
        )


def _choices() -> dict[str, str]:
    chosen = HydraConfig.get().runtime.choices
    return {str(key): str(value) for key, value in chosen.items() if "/" not in key}


def _command() -> str:
    """The command of this run; for a job of a sweep, or a call of `fastdeq.experiment.run`, the
    command that runs this job alone.
    """
    hydra = HydraConfig.get()
    words = sys.argv[1:] if hydra.mode == RunMode.RUN else hydra.overrides.task
    return f"{typed('train')} {shlex.join(words)}".rstrip()


def _started() -> float:
    """`time.time` at the start of the command: of the process, or of this job or call."""
    if HydraConfig.get().mode != RunMode.RUN or not Path("/proc/self/stat").exists():
        return time.time()
    ticks = float(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
