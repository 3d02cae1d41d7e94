"""The ranks that Slurm's `srun` has started: how the leader (rank 0) and its workers find each
other, and in which order they end.
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
    """The tasks that one `srun` has started, one for each device, and which of them this one is.

    address, port: of the first one; the port after it is free too, as far as can be known.
    """

    rank: int
    ranks: int
    nodes: int
    address: str
    port: int


@cache
def current_step() -> Step | None:
    """The step that this process belongs to; None where Slurm has started it alone or not at all:
    then it starts its ranks by itself.

    A batch script has most of Slurm's variables too; the number of a step's tasks has `srun` alone.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "SLURM_PROCID" not in os.environ:
        return None
    nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
    # Lightning wants the number in words of sbatch, which a bare `srun -n` does not leave.
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(tasks // nodes))
    address = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
    # Below the ports that the kernel gives away, and different for jobs that share a node.
    number = int(os.environ["SLURM_JOB_ID"]) + 97 * int(os.environ.get("SLURM_STEP_ID", 0))
    port = 15000 + 2 * (number % 8000)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    rank = int(os.environ["SLURM_PROCID"])
    return Step(rank=rank, ranks=tasks, nodes=nodes, address=address, port=port)


class RankFailed(RuntimeError):
    """A rank that is not this one has failed, and its failure explains this one's."""


class Rendezvous:
    """A store by which the leader sends the job to its workers, and a worker its error to the
    leader.

    Over the network and not through files: a file that one node writes may be seen on another one a
    minute later. What is sent is pickled, as torch.distributed does it, among a user's own tasks.

    Raises: torch's DistStoreError where a worker cannot reach the leader within ten minutes.
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
        """Of the leader: the job of all; None releases the workers. Only the first call counts."""
        if not self._store.check([_JOB]):
            self._store.set(_JOB, pickle.dumps(job).hex())

    def receive(self) -> Any:
        """Of a worker: wait for the job, however long the leader prepares its data."""
        while not self._store.check([_JOB]):
            time.sleep(_LOOK)  # where a signal is noticed, as it would not be inside of torch
        return pickle.loads(bytes.fromhex(self._store.get(_JOB).decode()))

    def fail(self, text: str, trace: str) -> None:
        """Of a worker: give the leader the reason why its collectives break."""
        self._store.set(_ERROR, json.dumps([text, trace]))
        self._wait(lambda: self._store.check([_NOTED]), _LEAVE)

    def failure(self) -> tuple[str, str] | None:
        """Of the leader: the error of a worker and its traceback, if one has failed."""
        if not self._wait(lambda: self._store.check([_ERROR]), 10 * _LOOK):
            return None
        self._store.set(_NOTED, "")
        text, trace = json.loads(self._store.get(_ERROR))
        return text, trace

    def leave(self) -> None:
        """The leader ends last: `srun --kill-on-bad-exit` ends the others when one fails, and they
        have results to write; and the store is the leader's.
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
    """That of the step, one per process; None outside of a step of several tasks."""
    step = current_step()
    return None if step is None else Rendezvous(step)


def release_workers() -> None:
    """Of the leader, at its end: release the workers that still wait for a job."""
    if (found := rendezvous()) is not None and found.step.rank == 0:
        found.send(None)


def is_worker() -> bool:
    """Whether this process is a worker: a rank of a step that is not the first."""
    step = current_step()
    return step is not None and step.rank > 0


def preemption_signal() -> signal.Signals:
    """What submitit listens to: the announcement that a job's time is nearly up."""
    return signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]


def in_submitit() -> bool:
    """Whether submitit has started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ


_status = 0


def end_with(status: int) -> None:
    """Let this process, if it belongs to a cluster's job, end with `status`, whatever comes.

    submitit takes an exception that its job has handled for a success, and a job that writes its
    result and then fails is what is wanted: the sweep continues, and Slurm says FAILED.
    """
    global _status
    _status = status
    if in_submitit() or current_step() is not None:
        atexit.unregister(_leave)
        atexit.register(_leave)  # of the handlers the first to be called


def _leave() -> None:
    """Like `launch.leave`: the interpreter is not taken apart around the threads of gloo."""
    sys.stdout.flush()
    sys.stderr.flush()
    if current_step() is not None and rendezvous.cache_info().currsize:
        found = rendezvous()
        assert found is not None
        found.leave()
    os._exit(_status)


def requeue() -> None:
    """Hand the signal on to submitit, whose handler is back in its place: it puts the job into the
    queue again and ends the process, or returns in a rank that is not the first.

    Raises: submitit's UncompletedJobError where it does not (max_num_timeout).
    """
    signal.raise_signal(preemption_signal())
