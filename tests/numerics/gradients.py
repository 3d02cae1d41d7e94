"""Gradients of the problems by every solver and adjoint, for the tests of adjoints."""

from typing import Any

import torch
from torch import Tensor

from fastdeq import GMRES, Solution, fixed_point
from fastdeq.adjoints import AbstractAdjoint, Implicit, Reversible, Unrolled
from fastdeq.flatten import Layout
from fastdeq.solvers import AbstractSolver
from tests.problems import SOLVERS, Problem

TIGHT = 1e-13

FORWARD: dict[str, AbstractSolver] = {
    name: make(tol=TIGHT, max_steps=2500) for name, make in SOLVERS.items()
}
BACKWARD: dict[str, AbstractAdjoint] = {
    "gmres": Implicit(solver=GMRES(tol=TIGHT, max_steps=60)),
    **{name: Implicit(solver=solver) for name, solver in FORWARD.items()},
    "unrolled": Unrolled(),
}
EXACT: dict[str, AbstractAdjoint] = {**BACKWARD, "backwards": Reversible()}
"""With those that need a solver of their own."""


def cotangent(problem: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(problem.exact.shape, generator=generator, dtype=torch.float64)


def solved(problem: Problem, solver: AbstractSolver, adjoint: AbstractAdjoint) -> Solution:
    return fixed_point(problem.f, problem.z0, solver=solver, adjoint=adjoint)


def flat(problem: Problem, solution: Solution) -> Tensor:
    return Layout.of(problem.z0).flatten(solution.value)


def gradients(problem: Problem, solver: AbstractSolver, adjoint: AbstractAdjoint) -> Any:
    value = flat(problem, solved(problem, solver, adjoint))
    return torch.autograd.grad(value, problem.leaves, cotangent(problem))


def relative_errors(got: Any, expected: Any) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
