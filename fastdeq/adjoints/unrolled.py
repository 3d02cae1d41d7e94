"""L2: backpropagation through the solver, as a reference and a baseline."""

from torch import Tensor

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium
from fastdeq.notation import FlatMap
from fastdeq.settings import settings
from fastdeq.solution import TraceKind
from fastdeq.solvers import AbstractSolver, solve


@settings
class Unrolled(AbstractAdjoint):
    """The gradient of the iteration itself, through all its steps and into z0.

    Equals the implicit one in the limit of a tight solve. Memory grows with the steps.

    Raises: ValueError for a solver whose steps autograd cannot run through (NewtonKrylov).
    """

    def equilibrium(
        self, f: FlatMap, z0: Tensor, solver: AbstractSolver, trace: TraceKind | None
    ) -> Equilibrium:
        if not solver.differentiable:
            raise ValueError(
                f"Unrolled cannot backpropagate through {type(solver).__name__}: use the Implicit "
                "adjoint with it, or unroll Picard, Anderson or LimitedMemoryBroydenSolver"
            )
        forward = solve(solver, f, z0, trace=trace)
        output = f(forward.value)
        return Equilibrium(output, output - forward.value, forward)
