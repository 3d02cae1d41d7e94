"""Runs and sweeps on a real Slurm of two nodes: ranks, interruptions, failures, and the command
``fastdeq jobs``.

A run waits in its ninth step for a signal (tests.process.faults.Waiting), so that what is
interrupted is known; then it must end as the run that was not.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("submitit")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

from fastdeq.cluster.command import main
from tests.commands import ROOT, CommandLine
from tests.comparisons import assert_same
from tests.process import slurm
from tests.process.slurm import Slurm, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(slurm.missing() is not None, reason=f"no Slurm: {slurm.missing()}"),
]

RUN = (
    *("model=skip_deq", "trainer.max_epochs=1", "trainer.limit_train_batches=14"),
    *("trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.accelerator=cpu"),
)
TWO = ("trainer=ddp_cpu", "trainer.devices=1", "trainer.num_nodes=2")
WAITING = "+callbacks.waiting._target_=tests.process.faults.Waiting"
SMALL = tuple(
    f"hydra.launcher.{setting}" for setting in ("cpus_per_task=1", "mem_gb=1", "timeout_min=10")
)


@dataclass(frozen=True)
class Cluster:
    """A Slurm, and the folder on "all its nodes" where commands are given."""

    slurm: Slurm
    folder: Path

    def __call__(self, *command: str, status: int = 0) -> str:
        """What a command prints that must end with this status."""
        ended = subprocess.run(
            command,
            cwd=self.folder,
            env=self.slurm.environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert ended.returncode == status, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    def train(self, *arguments: str, status: int = 0) -> str:
        return self(sys.executable, str(ROOT / "train.py"), *arguments, status=status)

    def jobs(self, *arguments: str, status: int = 0) -> str:
        """Likewise ``fastdeq jobs``, without its start: in this process."""
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
            for name, value in self.slurm.environment.items():
                patch.setenv(name, value)
            patch.chdir(self.folder)
            with redirect_stderr(out):
                assert main(arguments) == status, out.getvalue()
        return out.getvalue()

    def submit(self, *arguments: str) -> tuple[Path, str]:
        """The sweep's folder and its number in Slurm."""
        printed = self.jobs("submit", *RUN, *SMALL, *arguments)
        found = re.search(r"as (\d+): see (\S+)", printed)
        assert found, printed
        return self.folder / found[2], found[1]

    def script(self, name: str, *options: str, arguments: tuple[str, ...]) -> str:
        """Submit slurm/NAME, without the GPUs that are not here; its number."""
        size = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem=500M", *options)
        return self(
            "sbatch", "--parsable", *size, str(ROOT / "slurm" / name), *RUN, *arguments
        ).strip()

    def wait_until_ended(self, number: str) -> list[str]:
        """The states that all jobs of this number have ended in."""

        def ended() -> bool:
            states = self.slurm.states(number)
            return not {"PENDING", "RUNNING", "COMPLETING", "REQUEUED"} & set(states)

        wait_for(ended, f"the end of job {number}")
        return self.slurm.states(number)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("slurm")
    (root / "here").mkdir()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        try:
            running = stack.enter_context(slurm.running(root / "daemons"))
        except slurm.NotStarted as reason:
            pytest.skip(str(reason))
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        python = f"{Path(sys.executable).parent}:{running.environment['PATH']}"
        for name in ("FASTDEQ_DATA", "FASTDEQ_CACHE"):
            patch.delenv(name, raising=False)
            running.environment.pop(name, None)
        running.environment.update(PYTHONPATH=path, PATH=python)
        yield Cluster(running, root / "here")


@dataclass(frozen=True)
class TimedOut:
    """Jobs that need a minute until their time is over, while other tests run."""

    sweep: Path
    number: str
    script: str


@pytest.fixture(scope="module")
def timed_out(cluster: Cluster) -> TimedOut:
    times = ("hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=60")
    sweep, number = cluster.submit(*times, "seed=1", "name=timed_out", WAITING)
    script = cluster.script(
        "one_run.sbatch",
        *("--time=2", "--signal=USR2@60", "--nodes=2", "--ntasks-per-node=1"),
        arguments=(*TWO, "seed=1", WAITING),
    )
    return TimedOut(sweep, number, script)


@pytest.fixture(scope="module")
def sweep(cluster: Cluster, timed_out: TimedOut) -> dict[int, Path]:
    """Two runs of two ranks on two nodes, by ``train.py -m``, which waits: folders by seed."""
    printed = cluster.train("-m", "hydra/launcher=submitit_slurm", *SMALL, *RUN, *TWO, "seed=1,2")
    assert "| 2 " in printed
    (records,) = (
        folder / "jobs"
        for folder in (cluster.folder / "outputs" / "multirun").iterdir()
        if (folder / "table.md").exists()
    )
    folders = [Path(json.loads(path.read_text())["folder"]) for path in records.iterdir()]
    return {content(folder)["seed"]: folder for folder in folders}


def content(folder: Path, name: str = "summary.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def processes_of(number: str) -> list[int]:
    """Of submitit in a job: those of Python whose environment names it. Not srun, whose command
    line names submitit too, and which blocks signals of its own before any task has started.
    """
    mark = f"SLURM_JOB_ID={number}\0".encode()
    python = Path(sys.executable).resolve()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (
                (folder / "exe").readlink() == python
                and b"submitit.core" in (folder / "cmdline").read_bytes()
                and mark in (folder / "environ").read_bytes()
            ):
                found.append(int(folder.name))
    return found


def blocks_usr2(pid: int) -> bool:
    """Whether the process has reached `patient.py`, which a signal before would end."""
    with suppress(OSError):
        mask = re.search(r"^SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return mask is not None and bool(int(mask[1], 16) >> (signal.SIGUSR2 - 1) & 1)
    return False


def run_of(sweep: Path, number: int = 0) -> Path:
    jobs = json.loads((sweep / "submission.json").read_text())["jobs"]
    return Path(jobs[number]["run"])


def test_two_jobs_of_two_ranks_on_two_nodes_make_two_run_folders(
    cluster: Cluster, sweep: dict[int, Path]
) -> None:
    assert set(sweep) == {1, 2}
    for folder in sweep.values():
        assert content(folder)["devices"] == 2
        assert content(folder)["steps"] == 14
        assert (folder / "train.log").read_text().count("run folder") == 1
    made = {path.parent for path in cluster.folder.glob("outputs/digits/**/config.yaml")}
    assert {path.resolve() for path in made} == {path.resolve() for path in sweep.values()}
    ran = [job for job in cluster.slurm.jobs() if job["JobState"] == "COMPLETED"]
    assert len([job for job in ran if job["NodeList"] == "127.0.0.[1-2]"]) >= 2


def test_a_run_records_its_own_command_and_not_that_of_submitit(sweep: dict[int, Path]) -> None:
    summary = json.loads((sweep[2] / "summary.json").read_text())
    assert summary["command"].startswith("fastdeq train ")
    assert "seed=2" in summary["command"]
    assert "seed=2" in json.loads((sweep[2] / "overrides.json").read_text())


def test_a_preempted_run_resumes_and_ends_as_the_one_that_was_not(
    cluster: Cluster, sweep: dict[int, Path]
) -> None:
    submitted, number = cluster.submit(*TWO, "seed=1", "name=preempted", WAITING)
    run = run_of(submitted)
    wait_for(lambda: len(list(run.glob("waiting.*"))) == 2, "both ranks in their ninth step")
    (node,) = [job["BatchHost"] for job in cluster.slurm.jobs() if job["JobId"] == number]
    urgent = cluster(
        *("sbatch", "--parsable", "-p", "high", "-w", "127.0.0.2", "--exclusive", "-o"),
        *("/dev/null", "--wrap", "true"),
    ).strip()
    assert node == "127.0.0.1"
    assert cluster.wait_until_ended(urgent) == ["COMPLETED"]
    assert cluster.wait_until_ended(number) == ["COMPLETED"]
    assert cluster.slurm.job(number)["Restarts"] == "1"
    assert (run / "train.log").read_text().count("resuming    from") == 1
    assert_same(sweep[1], run)


def test_a_signal_in_the_first_second_is_not_lost(cluster: Cluster) -> None:
    folder, number = cluster.submit("seed=8", "name=early")
    wait_for(lambda: cluster.slurm.states(number) == ["RUNNING"], "the job's start")
    wait_for(lambda: any(map(blocks_usr2, processes_of(number))), "its process")
    cluster("scancel", "--signal=USR2", number)
    assert not run_of(folder).exists()  # torch is being imported
    assert cluster.wait_until_ended(number) == ["COMPLETED"]
    assert cluster.slurm.job(number)["Restarts"] == "1"
    assert content(run_of(folder))["steps"] == 14
    assert "stopped after" in (run_of(folder) / "train.log").read_text()


def test_a_failed_job_is_failed_for_slurm_and_named(cluster: Cluster) -> None:
    broken = "+callbacks.broken._target_=tests.process.faults.FailingRank"
    folder, number = cluster.submit(
        *("trainer=ddp_cpu", "trainer.devices=2", "trainer.num_nodes=1", broken)
    )
    assert cluster.wait_until_ended(number) == ["FAILED"]
    assert content(run_of(folder), "status.json")["status"] == "failed"
    printed = cluster.jobs("collect", f"--sweep={folder}", status=1)
    assert printed.strip() == "job 0 FAILED: a process failed: RuntimeError: the second fails"
    log = (run_of(folder) / "train.log").read_text()
    assert "in on_train_batch_start" in log.rpartition("There:")[2]


def test_jobs_are_listed_shown_and_cancelled(cluster: Cluster) -> None:
    folder, number = cluster.submit("seed=4,5", "hydra.launcher.array_parallelism=1", WAITING)
    first = run_of(folder)
    wait_for((first / "waiting.0").exists, "the first job in its ninth step")
    table = cluster.jobs("status").splitlines()  # of the newest sweep
    assert [cell.strip() for cell in table[2].split("|")[1:6]] == [
        *("0", f"{number}_0", "RUNNING", "running", "4")
    ]
    assert [cell.strip() for cell in table[3].split("|")[1:6]] == [
        *("1", f"{number}_1", "PENDING", "", "5")
    ]
    assert "run folder" in cluster.jobs("logs", "0")
    assert "nothing yet" in cluster.jobs("logs", "1", status=1)
    assert "PENDING" in cluster.jobs("collect", f"--sweep={folder}", status=75)
    assert f"{number}_1" in cluster.jobs("cancel", "1", f"--sweep={folder}")
    assert f"{number}_0" in cluster.jobs("cancel", f"--sweep={folder}")
    assert cluster.wait_until_ended(number) == ["CANCELLED"] * 2
    wait_for(
        lambda: content(first, "status.json")["status"] == "interrupted", "its last saved state"
    )
    assert not run_of(folder, 1).exists()


def test_an_array_runs_the_jobs_that_are_listed(cluster: Cluster) -> None:
    arguments = ("seed=6,7", "name='an array'")
    listed = cluster.jobs("list", *RUN, *arguments).splitlines()
    assert [line.split()[-3] for line in listed] == ["seed=6", "seed=7"]
    number = cluster.script("sweep_array.sbatch", "--array=1-2", arguments=arguments)
    assert sorted(cluster.wait_until_ended(number)) == ["COMPLETED", "FAILED"]  # no third one
    run = cluster.folder / "outputs" / "slurm" / number / "1"
    assert (content(run)["seed"], content(run)["name"]) == (7, "an array")


def test_a_run_out_of_time_resumes_and_ends_as_the_one_that_was_not(
    cluster: Cluster, timed_out: TimedOut, command: CommandLine
) -> None:
    assert command(*RUN, "seed=1", "paths.run=whole").status == 0
    assert cluster.wait_until_ended(timed_out.number) == ["COMPLETED"]
    assert int(cluster.slurm.job(timed_out.number)["Restarts"]) >= 1
    assert_same(command.folder / "whole", run_of(timed_out.sweep))
    printed = cluster.jobs("collect", f"--sweep={timed_out.sweep}")
    assert printed.splitlines()[0].split("|")[1].strip() == "runs"


def test_a_plain_script_out_of_time_resumes_and_ends_as_the_one_that_was_not(
    cluster: Cluster, timed_out: TimedOut, sweep: dict[int, Path]
) -> None:
    assert cluster.wait_until_ended(timed_out.script) == ["COMPLETED"]
    # The urgent job of another test may preempt it again, in its first second too.
    assert int(cluster.slurm.job(timed_out.script)["Restarts"]) >= 1
    assert_same(sweep[1], cluster.folder / "outputs" / "slurm" / timed_out.script)


REFUSALS = {
    "hydra.launcher.timeout_min=0": "hydra.launcher.timeout_min is not given",
    "hydra.launcher.timeout_min=2": "give the job more time, or a shorter delay",
    "hydra.launcher.partition=gold": "hydra.launcher.partition is gold, but there are high, normal",
    "hydra.launcher.nodes=2": "hydra.launcher.nodes is 2, but trainer.num_nodes is 1",
    "solver.tol=1e-3,-1": "solver.tol is -1",
    "model=deq,no": "there is no model=no",
    "paths.outputs=/proc/here": "paths.outputs: no folder can be made in",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_what_cannot_run_is_refused_before_it_is_submitted(cluster: Cluster, override: str) -> None:
    before = len(cluster.slurm.jobs())
    printed = cluster.jobs("submit", *RUN, *SMALL, override, status=1)
    (line,) = printed.splitlines()
    assert line.startswith("error: ")
    assert REFUSALS[override] in line
    assert len(cluster.slurm.jobs()) == before


def test_a_sweep_that_waits_is_checked_likewise(
    cluster: Cluster, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.slurm.environment.items():
        monkeypatch.setenv(name, value)
    answer = command("-m", "hydra/launcher=submitit_slurm", *RUN, "seed=1,2")
    assert answer.status == 1
    assert "hydra.launcher.timeout_min is not given" in answer.err
    assert not answer.files
