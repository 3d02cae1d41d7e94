"""Sweeps: a check before the first job, a record of each job, and a table at the end."""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from fastdeq.experiment.checks import check_values
from fastdeq.experiment.place import PLACE, place_of
from fastdeq.experiment.rendezvous import current_step
from fastdeq.experiment.submission import check_queue, check_tasks, to_submit
from fastdeq.extras import require
from fastdeq.report import SweepJob, SweepTable, read_jobs
from fastdeq.runs.files import write_json
from fastdeq.runs.folder import job_record
from fastdeq.runs.reading import job_records
from fastdeq.streams import terminal_width

T = TypeVar("T")
RESUMABLE = 75
"""The exit status of a run that has saved its state to resume later (sysexits' EX_TEMPFAIL)."""


def record_job(folder: Path | None, error: str | None, *, interrupted: bool = False) -> None:
    """Write <sweep>/jobs/<number>.json: the job's overrides, run folder and error.

    interrupted: the job did not fail, but stopped before its end and can resume.
    """
    hydra = HydraConfig.get()
    path = job_record(Path(hydra.sweep.dir), hydra.job.num)
    path.parent.mkdir(parents=True, exist_ok=True)
    given = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    record = {
        "overrides": {
            override.key_or_group: override.get_value_element_as_str() for override in given
        },
        "folder": None if folder is None else str(folder.absolute()),
        "error": error,
        "interrupted": interrupted,
    }
    write_json(path, record)


def failed_job() -> int | None:
    """The number of the first failed job of this sweep; None if none has failed."""
    for number, record in job_records(Path(HydraConfig.get().sweep.dir)):
        if record["error"] is not None and not record["interrupted"]:
            return number
    return None


class Sweep(Callback):
    """Hydra's callback around a sweep (conf/train.yaml: hydra.callbacks). Launchers send it to the
    processes of the jobs.
    """

    def __init__(self) -> None:
        self.jobs: int | None = None
        """The number of jobs of the sweep, once it has started."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Compose once with every value of the sweep and check it, before anything is written."""
        if current_step() is not None:
            raise ConfigError(
                ValueError(
                    "-m inside of a Slurm job of several tasks: start the sweep outside of it with "
                    "hydra/launcher=submitit_slurm, or as an array (slurm/sweep_array.sbatch)"
                )
            )
        _check_plugin(config, "launcher")
        _check_plugin(config, "sweeper")
        params = config.hydra.sweeper.get("params") or {}
        given = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
        loader = GlobalHydra.instance().config_loader()  # lists what glob(...) matches
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
        overrides = [_or_config_error(_alternatives, override) for override in parsed]
        first = [texts[0] for texts in overrides]
        launcher = to_submit(config.hydra.launcher)
        for place, texts in enumerate(overrides):
            for text in texts[1:] or texts:
                cfg = self._compose([*first[:place], text, *first[place + 1 :]])
                _or_config_error(_check, cfg)
                if launcher is not None:
                    _or_config_error(check_tasks, launcher, cfg.trainer)
        if launcher is not None:
            _or_config_error(check_queue, launcher)
        keys = [override.key_or_group for override in parsed]
        values = dict(zip(keys, map(len, overrides), strict=True))  # the last one of a key counts
        self.jobs = config.hydra.sweeper.get("n_trials") or math.prod(values.values())

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Keep the place of the job in the sweep."""
        PLACE.set(None if self.jobs is None else place_of(config.hydra, self.jobs))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Forget it."""
        PLACE.set(None)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the table; exit with status 1 if a job failed, 75 if one can resume."""
        folder = Path(config.hydra.sweep.dir)
        jobs = read_jobs(folder)
        if not jobs:
            return
        table = SweepTable(jobs)
        table.write(folder)
        width = terminal_width()
        text = table.markdown() if width is None else table.for_terminal(width)
        print(f"\n{text}\n\nmean ± standard deviation over seeds; see {folder}")
        unfinished = [job for job in jobs if job.error is not None]
        for job in unfinished:
            settings = " ".join(f"{key}={value}" for key, value in job.overrides.items())
            how = "was interrupted" if job.interrupted else "failed"
            print(f"job {job.number} {how} ({settings}): {job.error}", file=sys.stderr)
        if "direction" in config.hydra.sweeper:  # a search
            print(best_trial(jobs, config.hydra.sweeper.direction))
        if unfinished:
            sys.exit(RESUMABLE if all(job.interrupted for job in unfinished) else 1)

    def _compose(self, overrides: list[str]) -> DictConfig:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        cfg = _or_config_error(
            hydra.compose_config,
            "train",
            overrides,
            run_mode=RunMode.RUN,
            with_log_configuration=False,
        )
        if cfg.get("mode") == "replay":
            raise ConfigError(ValueError("mode=replay makes one step again: leave -m out"))
        if cfg.get("mode") == "curve":
            raise ConfigError(ValueError("mode=curve evaluates one checkpoint: leave -m out"))
        return cfg


def best_trial(jobs: Sequence[SweepJob], direction: str) -> str:
    """The best finished job of a search and the command that repeats it.

    direction: "maximize" or "minimize". Jobs whose score is NaN are not compared.
    """
    finished = [job for job in jobs if not math.isnan(job.score)]
    if not finished:
        return "no trial of the search has a score"
    best = (max if direction == "maximize" else min)(finished, key=lambda job: job.score)
    assert best.summary is not None
    settings = " ".join(f"{key}={value}" for key, value in best.overrides.items())
    metric = best.summary["score"]["metric"]
    return (
        f"best trial: job {best.number}, {metric} {best.score:.6g} ({settings})\n"
        f"its command: {best.summary['command']}"
    )


def _check(cfg: DictConfig) -> None:
    """Check the values of a composed job."""
    state = HydraConfig.instance()
    sweep = state.cfg
    try:
        state.set_config(cfg)  # interpolations read the choices of the job
        with open_dict(cfg):
            del cfg["hydra"]
        check_values(cfg)
    finally:
        state.cfg = sweep


class ConfigError(BaseException):
    """A sweep that cannot start. Not an Exception: Hydra turns those of callbacks into warnings."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _or_config_error(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Raises: ConfigError for any exception of the function."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        raise ConfigError(error) from error


def quiet_hydra() -> None:
    """Suppress the warning that files in conf/hydra/launcher have the names of plugins' choices.
    They set other defaults, and are meant to be validated against the plugins' types.
    """
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against")


def _check_plugin(config: DictConfig, key: str) -> None:
    """Raises: ConfigError for a launcher or sweeper that is not installed."""
    package = ".".join(str(config.hydra[key]._target_).split(".")[:2])
    if package != "hydra._internal":
        _or_config_error(
            require, f"hydra/{key}={config.hydra.runtime.choices[f'hydra/{key}']}", package
        )


def _alternatives(override: Override) -> list[str]:
    """One override for each value of the sweep.

    Raises: ValueError for a sweep without values.
    """
    if override.is_interval_sweep():  # searched by a sweeper: the ends of the interval
        interval = override.value()
        assert isinstance(interval, IntervalSweep)
        return [f"{override.get_key_element()}={end}" for end in (interval.start, interval.end)]
    if not override.is_sweep_override():
        return [override.input_line or ""]
    values = list(override.sweep_string_iterator())
    if not values:
        raise ValueError(f"{override.input_line} has no values: the sweep has no jobs")
    return [f"{override.get_key_element()}={value}" for value in values]
