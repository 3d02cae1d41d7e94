"""One row of a published table, in calls of bounded length: repeat the same call until it ends with
status 0 (75: stopped in time, the next call resumes; anything else: an error).

    python tools/published_row.py skip_mdeq vcab3 --minutes 9 data.root=PATH

The run lies in outputs/rows/<experiment>/<model>_<solver>_seed<seed>; at its end the table of all
rows that lie there is printed. Overrides (key=value) go to train.py; on a GPU solver.check_every=3
and trainer.precision=bf16-mixed are worth trying.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
MODELS = ("mdeq", "skip_mdeq", "skip_reg_mdeq", "neural_ode", "explicit", "residual")


def main() -> int:
    """Run or resume; the exit status of train.py."""
    given, overrides = arguments()
    rows = given.outputs / given.experiment
    folder = rows / f"{given.model}_{given.solver}_seed{given.seed}"
    command = [
        *(sys.executable, str(ROOT / "train.py"), f"experiment={given.experiment}"),
        *(f"model={given.model}", f"solver={given.solver}", f"seed={given.seed}"),
        *(f"paths.run={folder}", *overrides),
    ]
    if given.minutes is not None:
        command.append(f"stop_after={60 * given.minutes}")
    status = run(command)
    if status == 0:
        status = subprocess.run([sys.executable, "-m", "fastdeq", "report", str(rows)]).returncode
    return status


def run(command: list[str]) -> int:
    """Run train.py and pass signals on to it, once each; its exit status.

    In a process group of its own: a terminal would send it Ctrl-C as well, and a second signal
    ends a run at once, without its state.
    """
    process = subprocess.Popen(command, process_group=0)
    for number in STOPS:
        signal.signal(number, lambda received, frame: process.send_signal(received))
    return process.wait()


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """What was typed, and of it what is for train.py."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("solver", nargs="?", default="lbroyden", help="or vcab3, tsit5, ...")
    parser.add_argument("--experiment", default="cifar10_tiny")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="after which the call ends; default: never")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/rows"))
    words = sys.argv[1:]
    return (
        parser.parse_args([word for word in words if "=" not in word]),
        [word for word in words if "=" in word],
    )


if __name__ == "__main__":
    sys.exit(main())
