"""Submits a sweep as one array of jobs, after all jobs have been checked."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import Checkpointable

from fastdeq.cluster.record import Submitted, write_submission
from fastdeq.experiment.grid import Grid, check_job, read_grid, run_job
from fastdeq.experiment.submission import check_queue, check_tasks


def submit(arguments: Sequence[str]) -> tuple[Path, list[Submitted]]:
    """Check and submit all jobs; return the sweep's folder and its jobs.

    Raises, before anything is submitted: ValueError, TypeError, OSError or Hydra's errors; the
    error of a job has a note with its number.
    """
    grid = read_grid(arguments)
    check_queue(grid.launcher)
    runs = [_check(grid, number) for number in range(len(grid.jobs))]
    _make_folder(grid.folder)
    executor = _executor(grid.launcher)
    with executor.batch():
        queued = [executor.submit(_Job(grid, number)) for number in range(len(grid.jobs))]
    jobs = [
        Submitted(
            number=number,
            slurm=job.job_id,
            overrides=grid.jobs[number],
            run=runs[number],
            log=Path(job.paths.stdout),
        )
        for number, job in enumerate(queued)
    ]
    write_submission(grid.folder, jobs)
    return grid.folder, jobs


@dataclass(frozen=True)
class _Job(Checkpointable):
    """The callable that submitit sends to the nodes, and requeues unchanged."""

    grid: Grid
    number: int

    def __call__(self) -> float:
        return run_job(self.grid, self.number)


def _check(grid: Grid, number: int) -> Path:
    """Check a job; return its run folder. An error gets a note that names the job."""
    try:
        checked = check_job(grid, number)
        check_tasks(grid.launcher, checked.config["trainer"])
    except Exception as error:
        error.add_note(f"job {number} ({' '.join(grid.jobs[number])})")
        raise
    chosen = checked.config["paths"]["run"]
    return checked.folder_in_sweep if chosen is None else Path(chosen)


def _make_folder(folder: Path) -> None:
    """Raises: OSError if the folder cannot be made or written to."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"paths.outputs: no folder can be made in {folder.parent} ({error.strerror})"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"paths.outputs: {folder} cannot be written to")


def _executor(launcher: dict[str, Any]) -> submitit.AutoExecutor:
    """The same executor as that of Hydra's launcher, from the same settings."""
    own = {"_target_", "submitit_folder", "max_num_timeout"}
    executor = submitit.AutoExecutor(
        cluster="slurm",
        folder=launcher["submitit_folder"],
        slurm_max_num_timeout=launcher["max_num_timeout"],
        slurm_python=shlex.join([sys.executable, str(Path(__file__).with_name("patient.py"))]),
    )
    executor.update_parameters(
        **{
            key if key in _COMMON else f"slurm_{key}": value
            for key, value in launcher.items()
            if key not in own
        }
    )
    return executor


_COMMON = (
    *("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes"),
    *("name", "stderr_to_stdout"),
)
"""Parameters whose names do not depend on the kind of cluster."""
