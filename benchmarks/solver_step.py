"""Costs of a solver's step besides f: milliseconds, kernels, new memory, waits for the device.

python benchmarks/solver_step.py --runs 5 [--device cuda] [--against ../another/checkout]

One thread, fresh processes, those of the two checkouts in turns. The milliseconds belong to the
machine, the counts do not. On an accelerator every kernel is a launch, a wait empties the queue.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeq import GMRES
from fastdeq.solvers import Anderson, BroydenSolver, LimitedMemoryBroydenSolver, Picard, solve

HERE = Path(__file__).resolve().parents[1]
STEPS = 18  # as the published CIFAR-10 experiments take
NEVER = 1e-30  # a tolerance that no solve meets
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "_unique2")
"""Operations whose result the host needs, and `lift_fresh`, which brings Python's data and on an
accelerator is mostly followed by a blocking copy."""


class Operations(TorchDispatchMode):
    """Counts the operations within its context, without views.

    kernels, waits: numbers of operations. allocated: bytes of new tensors. written: entries
    written by each of the operations, in their order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = self.waits = self.allocated = 0
        self.written: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in WAITS or (name == "index" and _has_mask(args[1])):
            self.waits += 1
        if isinstance(result, Tensor) and not func.is_view and name not in ("detach", "lift_fresh"):
            self.kernels += 1
            self.written.append(result.numel())
            if not func._schema.is_mutable:
                self.allocated += result.nbytes
        return result


def _has_mask(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def cases(device: str) -> dict[str, Callable[[int], object]]:
    """By name, a solve of a given number of steps, of a cheap cell."""
    made: dict[str, Callable[[int], object]] = {}
    solvers = {
        "Picard": Picard(tol=NEVER),
        "Anderson": Anderson(tol=NEVER),
        "L-Broyden": LimitedMemoryBroydenSolver(tol=NEVER),
        "Broyden": BroydenSolver(tol=NEVER, line_search_steps=0),
    }
    for batch, size in ((16, 30720), (32, 64)):
        x, slope = torch.randn(batch, size), torch.linspace(-0.95, 0.95, size)
        x, slope = x.to(device), slope.to(device)
        for name, solver in solvers.items():
            if name != "Broyden" or size < solver.max_dim:  # type: ignore[attr-defined]
                made[f"{name} {batch}×{size}"] = _solve(solver, x, slope)
        made[f"GMRES {batch}×{size}"] = _linear(x, slope)
    return made


def _solve(solver: Any, x: Tensor, slope: Tensor) -> Callable[[int], object]:
    def run(steps: int) -> object:
        fields = {**vars(solver), "max_steps": steps}
        return solve(type(solver)(**fields), lambda z: torch.tanh(slope * z + x), 0 * x)

    return run


def _linear(x: Tensor, slope: Tensor) -> Callable[[int], object]:
    return lambda steps: GMRES(tol=NEVER, max_steps=steps).solve(lambda v: v - slope * v, x)


def measure(device: str) -> dict[str, dict[str, float]]:
    """For every case: ms per step (the least of several solves), and the mean counts of a step
    without the first two."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {}
    with torch.no_grad():
        for name, run in cases(device).items():
            few, many = _counted(run, 2), _counted(run, STEPS)
            counts = {
                kind: (getattr(many, kind) - getattr(few, kind)) / (STEPS - 2)
                for kind in ("kernels", "waits", "allocated")
            }
            found[name] = {"ms": min(_clocked(run, device) for _ in range(5)), **counts}
    return found


def _counted(run: Callable[[int], object], steps: int) -> Operations:
    operations = Operations()
    with operations:
        run(steps)
    return operations


def _clocked(run: Callable[[int], object], device: str) -> float:
    begin = _now(device)
    run(STEPS)
    return 1000 * (_now(device) - begin) / STEPS


def _now(device: str) -> float:
    if device == "cpu":  # one thread's own time, which other processes disturb least
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measured(checkout: Path, device: str) -> dict[str, dict[str, float]]:
    """`measure` in a fresh process, with the fastdeq of a checkout."""
    command = [sys.executable, __file__, "--measure", "--device", device]
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=env)
    found: dict[str, dict[str, float]] = json.loads(result.stdout)
    return found


def main() -> None:
    """Print a line a case: this checkout and, with --against, the other one and their ratio."""
    parser = argparse.ArgumentParser(description="The cost of a solver's step.")
    parser.add_argument("--runs", type=int, default=5, help="processes for each checkout")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--against", type=Path, help="another checkout of fastdeq, as 'before'")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.device)))
        return
    if given.runs < 1:
        parser.error("--runs must be at least 1")
    if given.against is not None and not (given.against / "fastdeq").is_dir():
        parser.error(f"--against {given.against} holds no folder fastdeq: give a checkout")
    checkouts = [HERE] if given.against is None else [given.against.resolve(), HERE]
    # In turns, so that a slow minute of the machine falls on all of them.
    rounds = [[measured(place, given.device) for place in checkouts] for _ in range(given.runs)]
    for name in rounds[0][0]:
        print(f"{name:20} {line([[one[name] for one in pair] for pair in rounds])}")


def line(rounds: list[list[dict[str, float]]]) -> str:
    """The results of a case, 'before → after' where two checkouts were measured."""
    shown = []
    for kind, form, unit in (
        ("ms", "{:.3f}", "ms"),
        ("kernels", "{:.0f}", "kernels"),
        ("allocated", "{:.0f}", "KiB new"),
        ("waits", "{:.1f}", "waits"),
    ):
        scale = 1 / 1024 if kind == "allocated" else 1
        medians = [
            scale * statistics.median(pair[i][kind] for pair in rounds)
            for i in range(len(rounds[0]))
        ]
        shown.append(" → ".join(form.format(median) for median in medians) + f" {unit}")
    if len(rounds[0]) == 2:
        ratios = [after["ms"] / before["ms"] for before, after in rounds]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        shown.append(f"time × {statistics.median(ratios):.2f} ({spread}, n = {len(ratios)})")
    return ", ".join(shown)


if __name__ == "__main__":
    main()
