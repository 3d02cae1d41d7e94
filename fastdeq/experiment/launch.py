"""The processes of a job: this one, or one for each device, started here.

Lightning would start ranks by running the command line again, and with it Hydra: under a sweep,
every child would begin the whole sweep (Lightning issue 11300). These children get a resolved
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
from fastdeq.experiment.signals import ASKED, listening, received
from fastdeq.runs.folder import log_file
from fastdeq.runs.log import logging_to
from fastdeq.runs.reading import is_done
from fastdeq.runs.status import Interrupted
from fastdeq.streams import keep_streams

_LOOK, _GRACE = 0.2, 2.0  # seconds: between two looks at the ranks; for them to end by themselves


def launch(job: Job) -> None:
    """Run the job to its end on `job.ranks` processes: this one, some that are started here, or
    those that a cluster has started, of which this is the first.

    Raises: what the work raises; of several processes, that of the first that failed, and the
    others are ended; Interrupted for a run that has saved its state to resume later.
    """
    log = log_file(job.folder, job.config["mode"])
    if (workers := rendezvous()) is not None:
        with logging_to(log):
            _run_leader(job, workers)
        return
    if job.ranks == 1:
        with logging_to(log):
            work(job)
        return
    ranks = spawn(_rank, args=(job, free_port()), nprocs=job.ranks, join=False)
    with logging_to(log):
        _wait_for(ranks)
    if not is_done(job.folder):  # all have ended well, but not the run
        raise Interrupted("stopped before its end, and can resume")


def work_for(leader: Rendezvous) -> None:
    """The work of a worker, a cluster's rank that is not the first: it composes and checks nothing,
    makes no folder, and prints nothing.

    Raises: what the work raises.
    """
    job = leader.receive()
    if job is not None:
        with listening():
            work(job)


def _run_leader(job: Job, workers: Rendezvous) -> None:
    """Raises: what the work raises; RankFailed where the failure of a worker caused it."""
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
    """Until all have ended; passes a signal to stop to them, once. The second one ends this
    process, and with it its ranks (see `_rank`).

    Raises: what the first rank that failed raised; the others are ended within seconds, for they
    may wait for it in vain.
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
    # For a rank SIGINT is the end of its parent (see `_rank`).
    number = signal.SIGTERM if name == "SIGINT" else signal.Signals[name]
    for process in ranks.processes:
        if process.is_alive():
            with suppress(ProcessLookupError):  # it has ended by now
                os.kill(process.pid, number)


def _first_failure(ranks: ProcessContext) -> tuple[str, int]:
    """The traceback of the rank that failed first, and its number: one that has lost its connection
    may have ended before the one that broke it off.
    """
    files = [(Path(name), rank) for rank, name in enumerate(ranks.error_files)]
    left = [(path, rank) for path, rank in files if path.exists()]
    first, rank = min(left, key=lambda found: found[0].stat().st_mtime_ns)
    trace: str = pickle.loads(first.read_bytes())
    for path, _ in left:
        path.unlink()
    return trace, rank


def _rank(rank: int, job: Job, port: int) -> None:
    """The life of one process: the variables that Lightning's environment reads, then the work."""
    # Ctrl-C at a terminal goes to the parent alone, which hands it on; SIGINT itself comes here
    # from the kernel when the parent has died (torch.multiprocessing asks for it), and ends us.
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
    # Only the first speaks; the others' failures reach the parent through `spawn`.
    log = log_file(job.folder, job.config["mode"])
    speaking = logging_to(log) if rank == 0 else nullcontext()
    # A cluster may send a signal to all processes, and the parent passes it on: two, but one event.
    stops = [number for number in ASKED if number != signal.SIGINT]
    with listening(stops, patient=True):
        with suppress(Interrupted), speaking:
            work(job)
        leave()  # still listening: the parent may pass a signal on to a rank that has done its work


def leave() -> None:
    """End this process, a rank whose work is done, with status 0; does not return.

    Threads of gloo hold tensors that Python shares. One that frees its tensor while the interpreter
    is being taken apart aborts the process (PyTorch 179291), and DistributedDataParallel's cycles
    keep the group alive till then. So the group goes first, and the interpreter is not taken apart.
    """
    gc.collect()
    if dist.is_initialized():
        dist.barrier()  # nobody closes a connection that another still reads
        dist.destroy_process_group()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def interactive() -> bool:
    """Whether a person watches: a progress bar in a log would fill it."""
    return sys.stdout.isatty()


def free_port() -> int:
    """Of this machine, for its processes to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
