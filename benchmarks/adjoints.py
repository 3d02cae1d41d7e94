"""Every adjoint on one problem: time of a step, cosine to the exact gradient, memory."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring import Row, in_turns
from fastdeq import GMRES, fixed_point
from fastdeq.adjoints import (
    AbstractAdjoint,
    Direct,
    Implicit,
    JacobianFree,
    Neumann,
    Phantom,
    Reversible,
    Shine,
    Unrolled,
)
from fastdeq.bench.operations import Watch
from fastdeq.solvers import (
    AbstractSolver,
    Anderson,
    LimitedMemoryBroydenSolver,
    ReversibleSolver,
)

_BATCH, _SIZE, _NEVER = 32, 128, 1e-30
ADJOINTS: dict[str, AbstractAdjoint] = {
    "Implicit (GMRES, tol 1e-3)": Implicit(solver=GMRES(tol=1e-3)),
    "Direct": Direct(),
    "Unrolled": Unrolled(),
    "Reversible": Reversible(),
    "Neumann(5)": Neumann(steps=5),
    "Shine": Shine(),
    "Shine(steps=3)": Shine(steps=3),
    "Phantom(5)": Phantom(steps=5),
    "JacobianFree": JacobianFree(),
}


class _Problem:
    """A training step with f(z) = tanh(W z + x), ‖W‖ about 0.8."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weight = nn.Parameter(0.4 * torch.randn(_SIZE, _SIZE) / _SIZE**0.5)
        self.x = torch.randn(_BATCH, _SIZE)
        self.cotangent = torch.randn(_BATCH, _SIZE)

    def gradient(self, solver: AbstractSolver, adjoint: AbstractAdjoint) -> Tensor:
        def f(z: Tensor) -> Tensor:
            return torch.tanh(z @ self.weight.T + self.x)

        found = fixed_point(f, torch.zeros_like(self.x), solver=solver, adjoint=adjoint)
        assert isinstance(found.value, Tensor)
        return torch.autograd.grad((found.value * self.cotangent).sum(), self.weight)[0]

    def peak(self, adjoint: AbstractAdjoint, steps: int) -> float:
        """Megabytes of the tensors that a step of so many solver steps has at once, at most."""
        solver = _solver(adjoint, _NEVER, steps)
        if isinstance(solver, LimitedMemoryBroydenSolver) and not isinstance(adjoint, Shine):
            solver = Anderson(tol=_NEVER, max_steps=steps)  # whose own memory does not grow
        with Watch(limit=math.inf) as watch:
            self.gradient(solver, adjoint)
        return float(watch.peak) / 1e6


def rows(quick: bool) -> Iterator[Row]:
    """Solves to 1e-5 for time and cosine; of 10 and of 100 steps for memory."""
    problem = _Problem()
    exact = problem.gradient(_solver(Implicit(), 1e-6, 100), Implicit(solver=GMRES(tol=1e-6)))
    cases: dict[str, Any] = {
        name: partial(problem.gradient, _solver(adjoint, 1e-5, 50), adjoint)
        for name, adjoint in ADJOINTS.items()
    }
    times = in_turns(cases, turns=1 if quick else 30, warm_up=1 if quick else 5)
    for name, adjoint in ADJOINTS.items():
        cosine = torch.cosine_similarity(cases[name]().flatten(), exact.flatten(), dim=0)
        few, many = (problem.peak(adjoint, steps) for steps in (10, 100))
        note = f"cosine {cosine:.4f}, peak {few:.2f} MB at 10 steps, {many:.2f} at 100"
        yield Row(
            section="adjoints", case=name, unit="ms", values={"fastdeq": times[name]}, note=note
        )


def _solver(adjoint: AbstractAdjoint, tol: float, steps: int) -> AbstractSolver:
    if isinstance(adjoint, Reversible):
        return ReversibleSolver(tol=tol, max_steps=steps)
    return LimitedMemoryBroydenSolver(tol=tol, max_steps=steps, memory=100)
