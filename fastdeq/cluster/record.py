"""The submitted jobs of a sweep and their states: submission.json, Slurm and the run folders."""

import json
from dataclasses import dataclass
from pathlib import Path

from submitit.slurm.slurm import SlurmInfoWatcher

from fastdeq.runs.files import write_json
from fastdeq.runs.folder import SUBMISSION
from fastdeq.runs.status import read_status

OPEN = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING", "SUSPENDED", "PREEMPTED")
"""States of Slurm in which a job has not ended."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """One job: its number in the sweep, its name in Slurm (12_0), its overrides and its paths.

    run: the run folder, which is made when the job starts. log: the output of its first rank.
    """

    number: int
    slurm: str
    overrides: tuple[str, ...]
    run: Path
    log: Path

    @property
    def status(self) -> str | None:
        """The status of the run; None before it starts."""
        status: str | None = read_status(self.run).get("status")
        return status


def write_submission(sweep: Path, jobs: list[Submitted]) -> None:
    """Write submission.json into the sweep's folder."""
    content = [
        {
            "slurm": job.slurm,
            "overrides": list(job.overrides),
            "run": str(job.run.absolute()),
            "log": str(job.log.absolute()),
        }
        for job in jobs
    ]
    write_json(sweep / SUBMISSION, {"jobs": content})


def read_submission(sweep: Path) -> list[Submitted]:
    """The jobs of a sweep in their order.

    Raises: FileNotFoundError for a folder without them, ValueError for a file that is damaged.
    """
    path = sweep / SUBMISSION
    if not path.is_file():
        raise FileNotFoundError(f"{sweep} is not a submitted sweep ({SUBMISSION} is missing)")
    try:
        return [
            Submitted(
                number=number,
                slurm=job["slurm"],
                overrides=tuple(job["overrides"]),
                run=Path(job["run"]),
                log=Path(job["log"]),
            )
            for number, job in enumerate(json.loads(path.read_text(encoding="utf-8"))["jobs"])
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read, it is damaged ({error})") from error


def newest(outputs: Path) -> Path:
    """The sweep that was submitted last.

    Raises: FileNotFoundError if there is none.
    """
    found = sorted(outputs.glob(f"multirun/*/{SUBMISSION}"))
    if not found:
        raise FileNotFoundError(
            f"{outputs}/multirun holds no sweep that was submitted: give its folder, sweep=PATH"
        )
    return found[-1].parent


def slurm_states(jobs: list[Submitted]) -> dict[int, str]:
    """The state of each job in Slurm, by its number; UNKNOWN if Slurm no longer has it."""
    watcher = SlurmInfoWatcher(delay_s=1)
    for job in jobs:
        watcher.register_job(job.slurm)
    watcher.update()
    # CANCELLED is followed by the id of the user who cancelled.
    states = {job.number: watcher.get_state(job.slurm, mode="cache") for job in jobs}
    return {number: state.split()[0] for number, state in states.items()}
