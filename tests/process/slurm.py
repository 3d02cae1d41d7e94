"""A real Slurm of two nodes on this machine: its own daemons, in a folder of its own.

No systemd, no cgroups, no root needed. It claims four processors a node whatever the machine has,
so that jobs run beside each other.
"""

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")
"""Names that resolve: the first one is where the ranks of a run meet."""

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue")
_PATIENCE = 180.0  # seconds, of which a machine that is not overloaded needs few

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as a credential lives.
AuthInfo=socket={root}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5,bf_interval=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
InactiveLimit=0
KillWait=5
MinJobAge=3600
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdLogFile={root}/slurmd-%n.log
SlurmdSpoolDir={root}/spool-%n
StateSaveLocation={root}/state
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {size}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {size}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""

# This Slurm keeps no accounts. A cluster does, and submitit asks them for states.
_SACCT = """#!{python}
import re, subprocess
print("JobID|State|NodeList")
jobs = subprocess.run(["scontrol", "show", "jobs", "-o"], capture_output=True, text=True).stdout
for line in jobs.splitlines():
    job = dict(re.findall(r"(\\S+?)=(\\S*)", line))
    if "JobId" not in job:
        continue
    array = job.get("ArrayJobId")
    task = job.get("ArrayTaskId", "")
    name = job["JobId"] if array is None else array + "_" + (
        task if task.isdecimal() else "[" + task.partition("%")[0] + "]")
    print(name, job["JobState"], job.get("NodeList", ""), sep="|")
"""


class NotStarted(RuntimeError):
    """The machine has Slurm's programs, but does not let them run."""


def missing() -> str | None:
    """Why Slurm cannot run here, or None."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"without {', '.join(absent)} (packages slurm-wlm and munge)" if absent else None


def wait_for(condition: Callable[[], object], what: str, patience: float = _PATIENCE) -> None:
    """Until the condition holds, which is looked at some times a second.

    Raises: TimeoutError, with `what`.
    """
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {patience:.0f} s for {what}")
        time.sleep(0.2)


@dataclass(frozen=True)
class Slurm:
    """A cluster that runs; `environment` is what its clients need."""

    root: Path
    environment: dict[str, str] = field(repr=False)

    def __call__(self, *command: str) -> str:
        """What a command of Slurm prints.

        Raises: subprocess.CalledProcessError where it fails.
        """
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def jobs(self) -> list[dict[str, str]]:
        """All jobs that there have been, with what Slurm says of each."""
        lines = self("scontrol", "show", "jobs", "-o").splitlines()
        words = [line.split() for line in lines if line.startswith("JobId=")]
        return [dict(word.partition("=")[::2] for word in line) for line in words]

    def job(self, number: str) -> dict[str, str]:
        """One of them, by its number."""
        (found,) = [job for job in self.jobs() if job["JobId"] == number]
        return found

    def states(self, number: str) -> list[str]:
        """Of a job, or of all of an array."""
        return [
            job["JobState"]
            for job in self.jobs()
            if number in (job["JobId"], job.get("ArrayJobId"))
        ]


@contextmanager
def running(root: Path) -> Iterator[Slurm]:
    """Start the daemons, and stop them whatever happens.

    Raises: NotStarted.
    """
    (root / "state").mkdir(parents=True)
    _configure(root)
    environment = {
        **os.environ,
        "SLURM_CONF": str(root / "slurm.conf"),
        "PATH": f"{root}:{os.environ['PATH']}:/usr/sbin",
    }
    slurm, daemons = Slurm(root, environment), list(_daemons(root))
    try:
        try:
            for command, _ in daemons:
                subprocess.run(
                    command, env=environment, check=True, capture_output=True, timeout=60
                )
            wait_for(lambda: _idle(slurm), f"two idle nodes; see {root}/*.log")
        except (OSError, subprocess.SubprocessError) as error:  # TimeoutError is an OSError
            raise NotStarted(f"Slurm does not start on this machine: {error}") from error
        yield slurm
    finally:
        with suppress(subprocess.SubprocessError):
            slurm("scancel", "--user", getuser())
            wait_for(lambda: not slurm("squeue", "-h"), "the jobs' end", patience=30)
        for _, file in reversed(daemons):
            _stop(file)


def _configure(root: Path) -> None:
    text = _CONF.format(
        host=platform.node(),
        user=getuser(),
        root=root,
        nodes=NODES,
        ports=_free_ports(3),
        size="CPUs=4 RealMemory=8000 State=UNKNOWN",
    )
    (root / "slurm.conf").write_text(text)
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o600)
    (root / "sacct").write_text(_SACCT.format(python=sys.executable))
    (root / "sacct").chmod(0o755)


def _daemons(root: Path) -> Iterator[tuple[list[str], Path]]:
    """Commands in the order of their start, each with the file of its process's number."""
    munge = {
        "--key-file": "munge.key",
        "--socket": "munge.socket",
        "--pid-file": "munged.pid",
        "--log-file": "munged.log",
        "--seed-file": "munged.seed",
    }
    options = [f"{name}={root / file}" for name, file in munge.items()]
    yield ["munged", "--force", *options], root / "munged.pid"
    conf = str(root / "slurm.conf")
    for node in NODES:
        yield ["slurmd", "-f", conf, "-N", node], root / f"slurmd-{node}.pid"
    yield ["slurmctld", "-f", conf], root / "slurmctld.pid"


def _idle(slurm: Slurm) -> bool:
    try:
        return slurm("sinfo", "-h", "-N", "-p", "normal", "-o", "%t").split() == ["idle"] * 2
    except subprocess.SubprocessError:  # the controller does not answer yet
        return False


def _stop(file: Path) -> None:
    """End a daemon; one that waits for another which has gone is killed."""
    try:
        number = int(file.read_text())
    except (OSError, ValueError):
        return
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(number, sign)
        with suppress(TimeoutError):
            wait_for(lambda: not _alive(number), "a daemon's end", patience=10)
            return


def _alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
