"""Peak memory of a training step at 10 and at 100 steps of a solver, in a process each.

python -m benchmarks.memory Anderson 100 fastdeq    prints the bytes of one
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch

from benchmarks.measuring import HAS_TORCHDEQ, Row
from benchmarks.steps import SOLVERS, Problem, our_step, their_step

STEPS = (10, 100)
KEPT = 5  # of the histories, which are full before the tenth step
BATCH, SIZE = 64, 2**13
RESET = Path("/proc/self/clear_refs")


def rows(quick: bool) -> Iterator[Row]:
    """Above the memory before the step, as Linux counts it; elsewhere there are no rows."""
    if not RESET.exists():
        return
    systems = ("fastdeq", "torchdeq") if HAS_TORCHDEQ else ("fastdeq",)
    names = ("Picard",) if quick else tuple(SOLVERS)
    wanted = list(product(names, STEPS, systems))
    with ThreadPoolExecutor(2) as two:  # nothing here is timed
        found_in = dict(zip(wanted, two.map(lambda one: in_process(*one), wanted), strict=True))
    for name in names:
        few, many = ({s: found_in[name, steps, s] for s in systems} for steps in STEPS)
        growth = ", ".join(f"{system} {many[system] / few[system]:.3f}" for system in systems)
        for steps, found in zip(STEPS, (few, many), strict=True):
            yield Row(
                section="peak memory, training step",
                case=f"{name}, {steps} steps",
                unit="MB",
                values={system: value / 1e6 for system, value in found.items()},
                note=f"of that at {STEPS[0]} steps: {growth}" if steps == STEPS[1] else "",
            )


def in_process(name: str, steps: int, system: str) -> float:
    """The bytes, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", name, str(steps), system]
    # A fixed threshold: freed tensors go back to the system, instead of staying in the heap.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[1]
    ended = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=env, cwd=root)
    return float(ended.stdout)


def measured(name: str, steps: int, system: str) -> float:
    """The growth of this process's largest size by one training step."""
    torch.set_num_threads(1)
    x, slope = torch.randn(BATCH, SIZE), torch.linspace(-0.95, 0.95, SIZE).requires_grad_()
    problem = Problem(
        f=lambda z: torch.tanh(slope * z + x),
        z0=torch.zeros(BATCH, SIZE),
        parameters=[slope],
        forward=steps + 1,
        backward=steps,
    )
    run = their_step(name, problem) if system == "torchdeq" else None
    run = run or our_step(name, problem, memory=KEPT)
    RESET.write_text("5", encoding="ascii")  # the peak is now the size; getrusage never falls
    before = size("VmRSS")
    run()
    return size("VmHWM") - before


def size(name: str) -> float:
    """A size of this process in bytes: VmRSS, now, or VmHWM, at the peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * float(re.search(rf"{name}:\s+(\d+)", status)[1])  # type: ignore[index]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SOLVERS)
    parser.add_argument("steps", type=int)
    parser.add_argument("system", choices=("fastdeq", "torchdeq"))
    given = parser.parse_args()
    print(measured(given.name, given.steps, given.system))
