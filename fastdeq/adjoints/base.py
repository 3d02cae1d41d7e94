"""What an adjoint is: how z* is found and how its gradient is attached."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdeq.autodiff import carries_tangent
from fastdeq.notation import FlatMap
from fastdeq.rows import wrapped
from fastdeq.settings import settings
from fastdeq.solution import BackwardReport, Recording, SolveResult
from fastdeq.solvers import AbstractSolver, solve


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
    """The solve whose memory does not grow with its steps.

    Raises: RuntimeError in forward-mode differentiation, which `no_grad` does not switch off: its
        tangents would pass through the solver's steps, or be lost, instead of those of the adjoint.
    """
    with torch.no_grad():
        result = solve(
            solver,
            wrapped(f, _without_tangents),
            z0.detach(),
            trace=record.trace,
            states=record.steps,
        )
    # Older torch would reuse, with gradients on, what autocast cast while they were off, and the
    # weights would get no gradient (pytorch issue 112583).
    torch.clear_autocast_cache()
    return result


def _without_tangents(f: FlatMap) -> FlatMap:
    """f, refused at its first evaluation if it closes over tensors with tangents."""

    def checked(z: Tensor) -> Tensor:
        output = f(z)
        if carries_tangent(output) and not carries_tangent(z):  # a Newton step's z has its own
            raise RuntimeError(
                "forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) do not pass "
                "through this adjoint: use the Unrolled adjoint with a tight tolerance, or reverse "
                "mode"
            )
        return output

    return checked
