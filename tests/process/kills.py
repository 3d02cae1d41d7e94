"""Kill a training run at random moments until it is done, and see whether the result differs.

    python -m tests.process.kills --kills 50 --seed 1 --folder FOLDER

Every process is forked from one that has imported everything, so that a start takes no seconds, and
ended by SIGKILL. Prints a JSON object; the exit status is 0 if every run that was killed ended as
the run that was not.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from fastdeq import experiment
from tests.comparisons import assert_same
from tests.configurations import composed

SETTINGS = (
    *("model=skip_deq", "scheduler=cosine", "loss.jacobian=0.1", "trainer.accelerator=cpu"),
    *("trainer.max_epochs=6", "data.batch_size=180", "trainer.log_every_n_steps=1"),
    "callbacks.resumption.steps=1",  # most of the time something is being written
)
LIMIT = 120.0  # seconds in which a run that nobody kills must be done


def main() -> int:
    """Run the schedule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    found = check(given.folder, given.kills, given.seed)
    print(json.dumps({"kills": sum(found), "runs": len(found), "kills of each": found}))
    return 0


def check(parent: Path, kills: int, seed: int) -> list[int]:
    """Kill runs so many times in all, which must end as `whole`, the run that is not killed; how
    often each was.

    Raises: SystemExit if a run fails; AssertionError if it differs from `whole`.
    """
    whole = parent / "whole"
    begin = time.monotonic()
    if (ended := wait(start(whole), LIMIT)) != 0:
        sys.exit(f"the run that nobody killed ended with {ended}")
    seconds = time.monotonic() - begin
    moments = random.Random(seed)
    restarts: list[int] = []
    while sum(restarts) < kills:
        folder, count = parent / f"killed{len(restarts)}", 0
        # In the later part of a run there is something to lose; a third of it lets it get there.
        while sum(restarts) + count < kills and kill(
            start(folder), moments.uniform(0, 0.6) * seconds
        ):
            count += 1
        if (ended := wait(start(folder), LIMIT)) != 0:
            sys.exit(f"{folder.name} ended with {ended} after {count} kills")
        assert_same(whole, folder)
        restarts.append(count)
    return restarts


def start(folder: Path) -> int:
    """A process that makes the run, or resumes it."""
    if pid := os.fork():
        return pid
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        experiment.run_config(composed(*SETTINGS, f"paths.run={folder}"))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def kill(pid: int, seconds: float) -> bool:
    """SIGKILL after so many seconds; False if the process has ended well by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            assert status == 0, status
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def wait(pid: int, seconds: float) -> int:
    """The exit status; −1 for a process that is stuck."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


if __name__ == "__main__":
    sys.exit(main())
