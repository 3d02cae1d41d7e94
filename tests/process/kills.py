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
    whole = given.folder / "whole"
    begin = time.monotonic()
    ended = wait(start(whole), LIMIT)
    seconds = time.monotonic() - begin
    if ended != 0:
        print(f"the run that nobody killed ended with {ended}", file=sys.stderr)
        return 1
    moments = random.Random(given.seed)
    killed, restarts, runs = 0, [], 0
    while killed < given.kills:
        folder = given.folder / f"killed{runs}"
        count = 0
        # In the later part of a run there is something to lose; a third of it lets it get there.
        while killed < given.kills and kill(start(folder), moments.uniform(0, 0.6) * seconds):
            killed, count = killed + 1, count + 1
        if (ended := wait(start(folder), LIMIT)) != 0:
            print(f"{folder.name} ended with {ended} after {count} kills", file=sys.stderr)
            return 1
        assert_same(whole, folder)
        restarts.append(count)
        runs += 1
    print(json.dumps({"kills": killed, "runs": runs, "kills of each": restarts}))
    return 0


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
