"""What an adjoint is: how z* is found and how its gradient is attached."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdeq.autodiff import carries_tangent
from fastdeq.notation import FlatMap
from fastdeq.rows import wrapped
from fastdeq.settings import settings
from fastdeq.solution import BackwardReport, Recording, SolveResult
from fastdeq.solvers import AbstractSolver
from fastdeq.solvers.loop import solve_with_memory
from fastdeq.transforms import Transforms, transformed


@dataclass(frozen=True)
class Equilibrium:
    """What an adjoint returns.

    value: f(z_sol), (B, D), with the adjoint's gradient.
    defect: f(z_sol) − z_sol, (B, D), with the graph of that one evaluation and z_sol held constant
        (except by `Unrolled`, whose graph continues through the steps).
    forward: the record of the solve, without the closing evaluation.
    backward: filled in when the backward pass runs.
    """

    value: Tensor
    defect: Tensor
    forward: SolveResult
    backward: BackwardReport = field(default_factory=BackwardReport)


@settings
class AbstractAdjoint(ABC):
    """Differentiate z* = f(z*, x) with respect to everything that f depends on.

    All adjoints close with the same evaluation z = f(z_sol): parameters and inputs get their
    gradients through it, by ordinary automatic differentiation, and the value does not depend on
    the adjoint. What differs is the cotangent w that reaches this evaluation: replaced by v with (I
    − Jᵀ) v = w, or by something cheaper.
    """

    def check(self, solver: AbstractSolver) -> None:  # noqa: B027 (most adjoints support every solver)
        """Refuse a solver that this adjoint does not support.

        Raises: ValueError that names one that it supports.
        """

    def equilibrium(
        self, f: FlatMap, z0: Tensor, solver: AbstractSolver, record: Recording
    ) -> Equilibrium:
        """Solve from z0 (B, D) and attach the gradient. The solver has passed `check`."""
        return self.close(f, solve_without_graph(f, z0, solver, record))

    @abstractmethod
    def close(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        """Evaluate f at `forward.value`, (B, D), and attach the gradient.

        Also called for each state on the way, with that state as `forward.value`.
        """


def solve_without_graph(
    f: FlatMap, z0: Tensor, solver: AbstractSolver, record: Recording
) -> SolveResult:
    """The solve whose memory does not grow with its steps; no derivative passes through it."""
    return solve_with_constants(f, z0, solver, record)[0]


def solve_with_constants(
    f: FlatMap, z0: Tensor, solver: AbstractSolver, record: Recording
) -> tuple[SolveResult, Any]:
    """The same, and the method's memory after its last step: None within transforms."""
    f, z0 = wrapped(f, _constant), z0.detach()
    with torch.no_grad():
        if transformed():
            around = Transforms()
            run = partial(_solved, around.settings(solver), record)
            found = around.record(around.outside(run, f, z0)[0]), None
        else:
            found = _solved(solver, record, f, z0)
    # Older torch would reuse, with gradients on, what autocast cast while they were off, and the
    # weights would get no gradient (pytorch issue 112583).
    torch.clear_autocast_cache()
    return found


def _solved(
    solver: AbstractSolver, record: Recording, f: FlatMap, z0: Tensor
) -> tuple[SolveResult, Any]:
    return solve_with_memory(solver, f, z0, record)


def _constant(f: FlatMap) -> FlatMap:
    """f without derivatives by what it closes over; `no_grad` does not switch off all of them."""

    def constant(z: Tensor) -> Tensor:
        output = f(z)
        if torch.compiler.is_compiling():
            return output
        if transformed() or (carries_tangent(output) and not carries_tangent(z)):
            return output.detach()  # not where z has a tangent: in a Newton step
        return output

    return constant
