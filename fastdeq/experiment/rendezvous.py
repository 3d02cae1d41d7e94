"""The ranks that Slurm's `srun` has started: how the leader (rank 0) and its workers communicate,
and in which order they end.
"""

import atexit
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

_LOOK, _CONNECT, _LEAVE = 0.2, 600.0, 20.0  # seconds
_JOB, _ERROR, _NOTED, _GONE = "job", "error", "noted", "gone"


@dataclass(frozen=True, kw_only=True)
class Step:
    """The tasks that one `srun` has started, one per device, and the rank of this one.

    address, port: of the first task; the next port is expected to be free too.
    """

    rank: int
    ranks: int
    nodes: int
    address: str
    port: int


@cache
def current_step() -> Step | None:
    """The step that this process belongs to; None if Slurm has started it alone or not at all. It
    then starts its ranks itself.

    A batch script has most of Slurm's variables too; only `srun` sets the number of a step's tasks.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "SLURM_PROCID" not in os.environ:
        return None
    nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
    # Lightning reads this variable of sbatch, which a bare `srun -n` does not set.
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(tasks // nodes))
    address = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
    # Below the kernel's ephemeral ports, and different for jobs that share a node.
    number = int(os.environ["SLURM_JOB_ID"]) + 97 * int(os.environ.get("SLURM_STEP_ID", 0))
    port = 15000 + 2 * (number % 8000)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    rank = int(os.environ["SLURM_PROCID"])
    return Step(rank=rank, ranks=tasks, nodes=nodes, address=address, port=port)


class RankFailed(RuntimeError):
    """Another rank has failed, which caused the error of this one."""


class Rendezvous:
    """A key-value store through which the leader sends the job to its workers, and a worker its
    error to the leader.

    It uses the network, since a file of one node may appear on another one a minute later. The job
    is pickled, as torch.distributed does it, among tasks of the same user.

    Raises: torch's DistStoreError if a worker cannot reach the leader within ten minutes.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self._store = TCPStore(
            step.address,
            step.port + 1,
            is_master=step.rank == 0,
            timeout=timedelta(seconds=_CONNECT),
            wait_for_workers=False,
        )

    def send(self, job: Any) -> None:
        """Leader: send the job; None releases the workers. Only the first call has an effect."""
        if not self._store.check([_JOB]):
            self._store.set(_JOB, pickle.dumps(job).hex())

    def receive(self) -> Any:
        """Worker: wait for the job, without a time limit, since the leader may prepare data."""
        while not self._store.check([_JOB]):
            time.sleep(_LOOK)  # signals are handled here; inside torch they would not be
        return pickle.loads(bytes.fromhex(self._store.get(_JOB).decode()))

    def fail(self, text: str, trace: str) -> None:
        """Worker: send the leader the error that breaks its collectives."""
        self._store.set(_ERROR, json.dumps([text, trace]))
        self._wait(lambda: self._store.check([_NOTED]), _LEAVE)

    def failure(self) -> tuple[str, str] | None:
        """Leader: the error and traceback of a worker, if one has failed."""
        if not self._wait(lambda: self._store.check([_ERROR]), 10 * _LOOK):
            return None
        self._store.set(_NOTED, "")
        text, trace = json.loads(self._store.get(_ERROR))
        return text, trace

    def leave(self) -> None:
        """Make the leader end last: it owns the store, and `srun --kill-on-bad-exit` would end the
        others when it fails, before they have written their results.
        """
        if self.step.rank > 0:
            self._store.add(_GONE, 1)
        else:
            self._wait(lambda: self._store.add(_GONE, 0) == self.step.ranks - 1, _LEAVE)

    def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        try:
            while not condition():
                if time.monotonic() > end:
                    return False
                time.sleep(_LOOK)
        except DistNetworkError:  # the leader has ended
            return False
        return True


@cache
def rendezvous() -> Rendezvous | None:
    """The rendezvous of the step, one per process; None outside a step of several tasks."""
    step = current_step()
    return None if step is None else Rendezvous(step)


def release_workers() -> None:
    """Leader, at its end: release the workers that still wait for a job."""
    if (found := rendezvous()) is not None and found.step.rank == 0:
        found.send(None)


def is_worker() -> bool:
    """Whether this process is a worker: a rank of a step that is not the first."""
    step = current_step()
    return step is not None and step.rank > 0


def preemption_signal() -> signal.Signals:
    """The signal that submitit handles: a job is about to reach its time limit."""
    return signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]


def in_submitit() -> bool:
    """Whether submitit has started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ


_status = 0


def end_with(status: int) -> None:
    """Make this process end with `status` if it belongs to a cluster's job.

    submitit counts a job that handles its exception as a success. Ending with a status after the
    result is written lets the sweep continue, and Slurm reports FAILED.
    """
    global _status
    _status = status
    if in_submitit() or current_step() is not None:
        atexit.unregister(_leave)
        atexit.register(_leave)  # registered last, so called first


def _leave() -> None:
    """Like `launch.leave`: the interpreter does not shut down while threads of gloo run."""
    sys.stdout.flush()
    sys.stderr.flush()
    if current_step() is not None and rendezvous.cache_info().currsize:
        found = rendezvous()
        assert found is not None
        found.leave()
    os._exit(_status)


def requeue() -> None:
    """Raise the signal again for submitit's handler, which is restored by now: it requeues the job
    and ends the process, or returns in a rank that is not the first.

    Raises: submitit's UncompletedJobError if it does not requeue (max_num_timeout).
    """
    signal.raise_signal(preemption_signal())
