"""The command ``fastdeq jobs``: a sweep in Slurm's queue, without waiting for it."""

import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from fastdeq.cluster.record import OPEN, Submitted, newest, read_submission, slurm_states
from fastdeq.cluster.submit import submit
from fastdeq.commands import Parser, exit_status, typed
from fastdeq.experiment.explain import explain
from fastdeq.experiment.grid import read_grid
from fastdeq.experiment.sweep import RESUMABLE
from fastdeq.extras import require
from fastdeq.report import SweepTable, read_jobs
from fastdeq.report.markdown import aligned


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 for an error, 2 for the usage, and 75 if
    requested jobs are not done yet.
    """
    # `fastdeq train` needs this flag for a sweep; here it has no effect.
    words = [word for word in arguments if word not in ("-m", "--multirun")]
    return exit_status(lambda: _run(parser().parse_args(words)), Exception, explain=_explain)


def _run(given: Namespace) -> int:
    require("fastdeq jobs", "hydra_plugins.hydra_submitit_launcher")
    return ACTIONS[given.action](given)


def _explain(error: Exception) -> str:
    where = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
    return f"{where}{explain(error)}"


def parser() -> Parser:
    """A subparser for each action."""
    command = typed("jobs")
    made = Parser(
        prog=command,
        description="Run a sweep as one array of Slurm jobs, without waiting for it.",
        examples=f"  {command} submit sweep=single_scale experiment=mnist_fc data.root=PATH "
        "hydra.launcher.timeout_min=60\n"
        f"  {command} status\n  {command} logs 3\n  {command} collect --sweep FOLDER",
    )
    overrides = Parser(add_help=False)
    overrides.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help=f"what {typed('train')} -m takes, and hydra.launcher.timeout_min=MINUTES; "
        "conf/hydra/launcher/submitit_slurm.yaml explains its other keys",
    )
    sweep = Parser(add_help=False)
    sweep.add_argument(
        "--sweep",
        type=Path,
        metavar="FOLDER",
        help="the folder that submit has printed (default: the newest in outputs/multirun)",
    )
    actions = made.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    added = {
        name: actions.add_parser(name, parents=[parent], help=text, description=text)
        for name, parent, text in (
            ("submit", overrides, "check all jobs and put them into the queue"),
            ("list", overrides, "print a line of overrides for each job; submit nothing"),
            ("status", sweep, "print a table: the state of each job in Slurm, and of its run"),
            ("logs", sweep, "print the log of a job"),
            ("cancel", sweep, "cancel one job, or all that have not ended"),
            ("collect", sweep, "print the table of what is done; status 75: a job is still open"),
        )
    }
    added["logs"].add_argument("number", type=int, metavar="N", help="the job's number")
    added["cancel"].add_argument("number", type=int, nargs="?", metavar="N", help="default: all")
    return made


def _sweep(given: Namespace) -> Path:
    """Raises: FileNotFoundError if there is none."""
    return newest(Path("outputs")) if given.sweep is None else Path(given.sweep)


def _job(sweep: Path, number: int) -> Submitted:
    """Raises: OSError or ValueError for an unknown job."""
    jobs = read_submission(sweep)
    if not 0 <= number < len(jobs):
        raise ValueError(f"there is no job {number}: {sweep} has 0 to {len(jobs) - 1}")
    return jobs[number]


def _submit(given: Namespace) -> int:
    folder, jobs = submit(given.overrides)
    first = jobs[0].slurm.partition("_")[0]
    print(f"{len(jobs)} jobs are in the queue, as {first}: see {folder}")
    print(f"{typed('jobs')} status --sweep {shlex.quote(str(folder))}")
    return 0


def _list(given: Namespace) -> int:
    for job in read_grid(given.overrides).jobs:
        print(shlex.join(job))
    return 0


def _status(given: Namespace) -> int:
    jobs = read_submission(_sweep(given))
    states, varied = slurm_states(jobs), _varied(jobs)
    rows = [["job", "slurm", "state", "run", *varied, "folder"]]
    for job in jobs:
        values = dict(override.split("=", 1) for override in job.overrides)
        cells = [str(job.number), job.slurm, states[job.number], job.status or ""]
        rows.append([*cells, *(values.get(key, "") for key in varied), str(job.run)])
    print(aligned(rows))
    return 0


def _logs(given: Namespace) -> int:
    job = _job(_sweep(given), given.number)
    if not job.log.exists():
        state = slurm_states([job])[job.number]
        raise FileNotFoundError(f"job {job.number} has printed nothing yet (Slurm says {state})")
    sys.stdout.write(job.log.read_text(encoding="utf-8", errors="replace"))
    return 0


def _cancel(given: Namespace) -> int:
    sweep = _sweep(given)
    jobs = read_submission(sweep) if given.number is None else [_job(sweep, given.number)]
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


def _collect(given: Namespace) -> int:
    sweep = _sweep(given)
    submitted = read_submission(sweep)
    records = {job.number: job for job in read_jobs(sweep)}
    done = [job for job in records.values() if job.summary is not None]
    if done:
        table = SweepTable(done)
        table.write(sweep)
        print(f"{table.markdown()}\n\nmean ± standard deviation over seeds; see {sweep}")
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


ACTIONS: dict[str, Callable[[Namespace], int]] = {
    "submit": _submit,
    "list": _list,
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "collect": _collect,
}
"""The functions of the actions."""


def _varied(jobs: Sequence[Submitted]) -> list[str]:
    """The keys in which the jobs differ."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for override in job.overrides:
            key, _, text = override.partition("=")
            values.setdefault(key, set()).add(text)
    return [key for key, texts in values.items() if len(texts) > 1]
