"""The place of a job in its sweep: which of how many, and how long the others will take."""

import statistics
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from fastdeq.report import read_jobs
from fastdeq.report.columns import duration


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of a job in its sweep, in the process that runs it.

    number: as in the record of the job, from 0. jobs: of the sweep; None: not known.
    at_once: jobs that run side by side. shared: whether their lines share a console.
    """

    number: int
    jobs: int | None
    at_once: int
    shared: bool
    folder: Path

    @property
    def prefix(self) -> str:
        """Of the job's lines on the console."""
        return f"[job {self.number}] " if self.shared else ""

    def heading(self, overrides: str) -> str:
        """What is printed before the job: its number, which of how many it is, and the time that
        is left of the sweep.
        """
        parts = [] if self.jobs is None else [f"{self.number + 1}/{self.jobs}"]
        if (left := self._seconds_left()) is not None:
            parts.append(f"about {duration(left)} left")
        text = f"[{', '.join(parts)}]  {overrides}" if parts else overrides
        return f"{self.prefix}{text}" if self.shared else f"\njob {self.number} {text}"

    def _seconds_left(self) -> float | None:
        """As if all jobs that have not ended took the mean training time of those that have."""
        try:
            ended = read_jobs(self.folder)
        except (OSError, ValueError):  # a folder that was removed: the job needs no estimate
            return None
        times = [each.metric("train_seconds") for each in ended]
        known = [seconds for seconds in times if seconds is not None]
        if self.jobs is None or not known:
            return None
        mean = statistics.fmean(known)
        return max(mean, mean * (self.jobs - len(ended)) / self.at_once)


PLACE: ContextVar[Place | None] = ContextVar("place", default=None)
"""Of the job that this process runs; None outside of a sweep."""


def prefix() -> str:
    """Of the lines that this process prints about its job; empty unless other jobs share the
    console.
    """
    place = PLACE.get()
    return "" if place is None else place.prefix


def place_of(hydra: DictConfig, jobs: int | None) -> Place:
    """The place of the job with this configuration of Hydra."""
    launcher = hydra.launcher
    target = str(launcher.get("_target_")).rpartition(".")[2]
    at_once = {"JoblibLauncher": launcher.get("n_jobs"), "LocalLauncher": jobs}.get(target) or 1
    return Place(
        number=int(hydra.job.num),
        jobs=jobs,
        at_once=at_once if at_once > 0 else jobs or 1,  # joblib: -1 means all cores
        shared=target in ("JoblibLauncher", "LocalLauncher"),
        folder=Path(hydra.sweep.dir),
    )
