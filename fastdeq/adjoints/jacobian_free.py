"""The Jacobian-free gradient."""

from torch import Tensor

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium, solve_without_graph
from fastdeq.notation import FlatMap
from fastdeq.settings import settings
from fastdeq.solution import TraceKind
from fastdeq.solvers import AbstractSolver


@settings
class JacobianFree(AbstractAdjoint):
    """v = w: backpropagation through the closing evaluation alone (Fung et al. 2021, arXiv
    2103.12803).

    Approximate: a descent direction where f is a sufficiently strong contraction. No backward
    solve.

    The same as one undamped step of `Phantom`, in higher derivatives too: these treat z_sol as a
    constant, and need not be a descent direction.
    """

    def equilibrium(
        self, f: FlatMap, z0: Tensor, solver: AbstractSolver, trace: TraceKind | None
    ) -> Equilibrium:
        forward = solve_without_graph(f, z0, solver, trace)
        output = f(forward.value)
        return Equilibrium(output, output - forward.value, forward)
