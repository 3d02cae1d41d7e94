"""The command ``python -m fastdeq.cluster``: a sweep in Slurm's queue, without waiting for it."""

import difflib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdeq.cluster.record import OPEN, Submitted, newest, read_submission, slurm_states
from fastdeq.cluster.submit import submit
from fastdeq.experiment.explain import explain
from fastdeq.experiment.grid import read_grid
from fastdeq.experiment.sweep import RESUMABLE
from fastdeq.report import SweepTable, read_jobs
from fastdeq.report.markdown import aligned


class UsageError(Exception):
    """A command line that cannot be understood; its text is one line."""


@dataclass(frozen=True)
class Request:
    """Which sweep, and which of its jobs; None: all."""

    sweep: Path
    number: int | None

    def jobs(self) -> list[Submitted]:
        """Raises: OSError or ValueError where they are not known."""
        jobs = read_submission(self.sweep)
        if self.number is None:
            return jobs
        if not 0 <= self.number < len(jobs):
            raise ValueError(
                f"there is no job {self.number}: {self.sweep} has 0 to {len(jobs) - 1}"
            )
        return [jobs[self.number]]


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 for an error, 2 for the usage, and 75 where
    jobs are not done that are asked for.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage())
        return 0 if arguments else 2
    action, *rest = arguments
    try:
        if action not in ACTIONS:
            raise UsageError(_unknown("action", action, ACTIONS))
        return ACTIONS[action](rest)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        where = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
        print(f"error: {where}{explain(error)}", file=sys.stderr)
        return 1


def usage() -> str:
    """Return what the command says when it is asked for help."""
    return (
        "usage: python -m fastdeq.cluster ACTION ...\n\n"
        "A sweep as one array of Slurm jobs, which this command does not wait for.\n\n"
        "  submit key=value ...  what train.py -m takes, and hydra.launcher.timeout_min=MINUTES;\n"
        "                        conf/hydra/launcher/submitit_slurm.yaml explains its other keys\n"
        "  list key=value ...    a line of overrides for each job; submits nothing\n"
        "  status                a table: what Slurm says of each job, and what its run does\n"
        "  logs N                what job N has printed\n"
        "  cancel [N]            job N, or all that have not ended\n"
        "  collect               the table of what is done; status 75 where a job is still open\n\n"
        "All but submit and list take sweep=FOLDER, which submit has printed; if not given, the\n"
        "newest one in outputs/multirun."
    )


def parse(arguments: Sequence[str]) -> Request:
    """Return what is asked for; raises UsageError, or OSError where there is no sweep."""
    sweep, number = None, None
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if argument.isdecimal():
            number = int(argument)
        elif key != "sweep":
            raise UsageError(_unknown("key", key, ("sweep",)))
        elif not equals or not text:
            raise UsageError("sweep has no value: write sweep=FOLDER")
        else:
            sweep = Path(text)
    return Request(newest(Path("outputs")) if sweep is None else sweep, number)


def _submit(arguments: Sequence[str]) -> int:
    folder, jobs = submit(_overrides(arguments))
    first = jobs[0].slurm.partition("_")[0]
    print(f"{len(jobs)} jobs are in the queue, as {first}: see {folder}")
    print(f"python -m fastdeq.cluster status sweep={shlex.quote(str(folder))}")
    return 0


def _list(arguments: Sequence[str]) -> int:
    for job in read_grid(_overrides(arguments)).jobs:
        print(shlex.join(job))
    return 0


def _status(arguments: Sequence[str]) -> int:
    request = parse(arguments)
    jobs = request.jobs()
    states = slurm_states(jobs)
    varied = _varied(read_submission(request.sweep))
    rows = [["job", "slurm", "state", "run", *varied, "folder"]]
    for job in jobs:
        values = dict(override.split("=", 1) for override in job.overrides)
        cells = [str(job.number), job.slurm, states[job.number], job.status or ""]
        rows.append([*cells, *(values.get(key, "") for key in varied), str(job.run)])
    print(aligned(rows))
    return 0


def _logs(arguments: Sequence[str]) -> int:
    request = parse(arguments)
    if request.number is None:
        raise UsageError("logs needs the number of a job: python -m fastdeq.cluster logs 0")
    (job,) = request.jobs()
    if not job.log.exists():
        state = slurm_states([job])[job.number]
        raise FileNotFoundError(f"job {job.number} has printed nothing yet (Slurm says {state})")
    sys.stdout.write(job.log.read_text(encoding="utf-8", errors="replace"))
    return 0


def _cancel(arguments: Sequence[str]) -> int:
    jobs = parse(arguments).jobs()
    states = slurm_states(jobs)
    names = [job.slurm for job in jobs if states[job.number] in (*OPEN, "UNKNOWN")]
    if names:
        answer = subprocess.run(
            ["scancel", *names],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if answer.returncode != 0:
            raise OSError(" ".join(answer.stderr.split()))
    print(f"cancelled: {', '.join(names) or 'none, all have ended'}")
    return 0


def _collect(arguments: Sequence[str]) -> int:
    request = parse(arguments)
    submitted = request.jobs()
    records = {job.number: job for job in read_jobs(request.sweep)}
    done = [job for job in records.values() if job.summary is not None]
    if done:
        table = SweepTable(done)
        table.write(request.sweep)
        print(f"{table.markdown()}\n\nmean ± standard deviation over seeds; see {request.sweep}")
    missing = [job for job in submitted if job.number not in {each.number for each in done}]
    states = slurm_states(missing)
    for job in missing:
        record = records.get(job.number)
        ended = record is not None and states[job.number] not in OPEN
        reason = f": {record.error}" if record is not None and ended else ""
        print(f"job {job.number} {states[job.number]}{reason}", file=sys.stderr)
    if any(state not in OPEN for state in states.values()):
        return 1
    return RESUMABLE if missing else 0


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "submit": _submit,
    "list": _list,
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "collect": _collect,
}
"""What the command does, by its first word."""


def _overrides(arguments: Sequence[str]) -> list[str]:
    """Raises: UsageError for a flag, which only train.py has."""
    words = [word for word in arguments if word not in ("-m", "--multirun")]
    for word in words:
        if word.startswith("-"):
            raise UsageError(f"{word} is for train.py alone: give key=value")
    return words


def _varied(jobs: Sequence[Submitted]) -> list[str]:
    """The keys in which the jobs differ."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for override in job.overrides:
            key, _, text = override.partition("=")
            values.setdefault(key, set()).add(text)
    return [key for key, texts in values.items() if len(texts) > 1]


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    cure = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(known)}"
    return f"unknown {what} {name!r}: {cure}"
