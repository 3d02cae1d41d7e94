"""The jobs of a sweep, from the arguments that `fastdeq train -m` takes, without starting them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from fastdeq.commands import CONF, typed
from fastdeq.experiment.command import job, run_worker
from fastdeq.experiment.renamed import check_renamed
from fastdeq.experiment.rendezvous import is_worker
from fastdeq.experiment.run import Checked, check
from fastdeq.experiment.submission import to_submit
from fastdeq.experiment.sweep import quiet_hydra
from fastdeq.streams import keep_streams


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A sweep: its folder, the launcher's settings, Hydra's overrides, and those of each job."""

    folder: Path
    launcher: dict[str, Any]
    hydra: tuple[str, ...]
    jobs: tuple[tuple[str, ...], ...]


def read_grid(arguments: Sequence[str]) -> Grid:
    """The sweep of `fastdeq train -m hydra/launcher=submitit_slurm` with these arguments.

    Raises: ValueError for another launcher or another sweeper than a grid; Hydra's own errors.
    """
    check_renamed(arguments)
    chosen = any(word.startswith("hydra/launcher=") for word in arguments)
    slurm = () if chosen else ("hydra/launcher=submitit_slurm",)
    with _hydra() as hydra:
        cfg = _compose(hydra, (*slurm, *arguments))
    sweeper, launcher = cfg.hydra.sweeper, to_submit(cfg.hydra.launcher)
    if launcher is None:
        raise ValueError(f"hydra/launcher is not submitit_slurm: use {typed('train')} -m")
    if not str(sweeper._target_).endswith(".BasicSweeper"):
        raise ValueError(f"a search does not know its jobs beforehand: use {typed('train')} -m")
    params = (sweeper.get("params") or {}).items()
    given = [*(f"{key}={value}" for key, value in params), *cfg.hydra.overrides.task]
    overrides = OverridesParser.create().parse_overrides(given)
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return Grid(
        folder=Path(cfg.hydra.sweep.dir),
        launcher=launcher,
        hydra=tuple(cfg.hydra.overrides.hydra),
        jobs=tuple(tuple(each) for each in jobs),
    )


def check_job(grid: Grid, number: int) -> Checked:
    """The job's configuration, for the nodes that it will run on.

    Raises: as `run` does.
    """
    with _job(grid, number) as cfg:
        return check(cfg, for_submission=True)


def run_job(grid: Grid, number: int) -> float:
    """Run the job in this process, as one of a sweep; return its test score.

    An error is recorded and sets the exit status of the process.
    """
    keep_streams()
    if is_worker():
        return run_worker()
    with _job(grid, number) as cfg:
        return job(cfg)


@contextmanager
def _job(grid: Grid, number: int) -> Iterator[DictConfig]:
    with _hydra() as hydra:
        place = f"hydra.sweep.dir='{grid.folder.absolute()}'"
        cfg = _compose(hydra, (*grid.hydra, place, *grid.jobs[number]))
        with open_dict(cfg):
            cfg.hydra.job.num = number
            cfg.hydra.mode = RunMode.MULTIRUN
            HydraConfig.instance().set_config(cfg)
            del cfg["hydra"]
        yield cfg


@contextmanager
def _hydra() -> Iterator[Hydra]:
    quiet_hydra()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF), job_name="train"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield hydra


def _compose(hydra: Hydra, overrides: Sequence[str]) -> DictConfig:
    return hydra.compose_config(
        "train", list(overrides), run_mode=RunMode.MULTIRUN, with_log_configuration=False
    )
