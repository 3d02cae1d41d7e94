"""Starts the processes of a job: this one, or one per device.

Lightning would start ranks by running the command line again, and Hydra with it: in a sweep, every
child would start the whole sweep (Lightning issue 11300). These processes get a resolved
configuration instead.
"""

import gc
import os
import pickle
import signal
import socket
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, ProcessRaisedException, spawn

from fastdeq.experiment.job import Job, work
from fastdeq.experiment.rendezvous import RankFailed, Rendezvous, rendezvous
from fastdeq.experiment.signals import STOP_SIGNALS, listening, received
from fastdeq.runs.folder import log_file
from fastdeq.runs.log import logging_to
from fastdeq.runs.reading import is_done
from fastdeq.runs.status import Interrupted
from fastdeq.streams import keep_streams

_LOOK, _GRACE = 0.2, 2.0  # seconds: between two looks at the ranks; for them to end by themselves


def launch(job: Job) -> None:
    """Run the job on `job.ranks` processes: this one, processes that are started here, or those of
    a cluster, if this is the first of them.

    Raises: the error of the work; with several processes the error of the one that failed first,
        and the others are ended; Interrupted if the run has saved its state to resume later.
    """
    log = log_file(job.folder, job.config["mode"])
    if (workers := rendezvous()) is not None:
        with logging_to(log, job.prefix):
            _run_leader(job, workers)
        return
    if job.ranks == 1:
        with logging_to(log, job.prefix):
            work(job)
        return
    ranks = spawn(_rank, args=(job, free_port()), nprocs=job.ranks, join=False)
    with logging_to(log, job.prefix):
        _wait_for(ranks)
    if not is_done(job.folder):  # all have ended well, but not the run
        raise Interrupted("stopped before its end, and can resume")


def work_for(leader: Rendezvous) -> None:
    """Run the job of the leader as a worker, a rank of a cluster that is not the first. A worker
    does not compose, check, make a folder or print.

    Raises: the error of the work.
    """
    job = leader.receive()
    if job is not None:
        with listening():
            work(job)


def _run_leader(job: Job, workers: Rendezvous) -> None:
    """Raises: the error of the work; RankFailed if the failure of a worker caused it."""
    workers.send(job)
    try:
        work(job)
    except Interrupted:
        raise
    except Exception as error:
        if (failure := workers.failure()) is None:
            raise
        text, trace = failure
        first = RankFailed(f"a process failed: {text}")
        first.add_note(f"There:\n{trace}")
        raise first from error


def _wait_for(ranks: ProcessContext) -> None:
    """Wait until all ranks have ended. The first stop signal is passed to them; a second one ends
    this process and thereby its ranks (see `_rank`).

    Raises: the error of the rank that failed first. The others are ended within seconds, since they
        may wait for it.
    """
    passed = False
    try:
        while not ranks.join(timeout=_LOOK, grace_period=_GRACE):
            if (name := received()) and not passed:
                passed = True
                _send(name, ranks)
    except ProcessRaisedException as error:
        trace, rank = _first_failure(ranks)
        raise ProcessRaisedException(f"there:\n{trace}", rank, error.error_pid) from None


def _send(name: str, ranks: ProcessContext) -> None:
    # A rank gets SIGINT when its parent has died (see `_rank`).
    number = signal.SIGTERM if name == "SIGINT" else signal.Signals[name]
    for process in ranks.processes:
        if process.is_alive():
            with suppress(ProcessLookupError):  # it has ended by now
                os.kill(process.pid, number)


def _first_failure(ranks: ProcessContext) -> tuple[str, int]:
    """The traceback and number of the rank that failed first. It need not be the first that ended:
    a rank that lost its connection may end before the one that caused it.
    """
    files = [(Path(name), rank) for rank, name in enumerate(ranks.error_files)]
    left = [(path, rank) for path, rank in files if path.exists()]
    first, rank = min(left, key=lambda found: found[0].stat().st_mtime_ns)
    trace: str = pickle.loads(first.read_bytes())
    for path, _ in left:
        path.unlink()
    return trace, rank


def _rank(rank: int, job: Job, port: int) -> None:
    """One process: set the variables that Lightning's environment reads, then do the work."""
    # Ctrl-C at a terminal reaches only the parent, which passes it on as SIGTERM. SIGINT comes from
    # the kernel when the parent has died (torch.multiprocessing sets this up), and ends this rank.
    os.setpgid(0, 0)
    keep_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if job.config["trainer"]["accelerator"] == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // job.ranks))
    # Only the first rank logs; `spawn` reports failures of the others to the parent.
    log = log_file(job.folder, job.config["mode"])
    log_output = logging_to(log, job.prefix) if rank == 0 else nullcontext()
    # A cluster may signal all processes, and the parent passes it on: two signals, one request.
    stops = [number for number in STOP_SIGNALS if number != signal.SIGINT]
    with listening(stops, patient=True):
        with suppress(Interrupted), log_output:
            work(job)
        leave()  # within `listening`: the parent may still pass a signal on


def leave() -> None:
    """End this process, a rank whose work is done, with status 0; does not return.

    Threads of gloo hold tensors that are shared with Python. A thread that frees its tensor while
    the interpreter shuts down aborts the process (PyTorch 179291), and reference cycles of
    DistributedDataParallel keep the group alive until then. So the group is destroyed first, and
    the interpreter does not shut down.
    """
    gc.collect()
    if dist.is_initialized():
        dist.barrier()  # no process closes a connection that another one still reads
        dist.destroy_process_group()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def interactive() -> bool:
    """Whether stdout is a terminal: a progress bar would fill a log."""
    return sys.stdout.isatty()


def free_port() -> int:
    """A free port of this machine, for the process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
