"""The Jacobian-free gradient."""

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium
from fastdeq.notation import FlatMap
from fastdeq.settings import settings
from fastdeq.solution import SolveResult


@settings
class JacobianFree(AbstractAdjoint):
    """v = w: backpropagation through the closing evaluation alone (Fung et al. 2021, arXiv
    2103.12803).

    Approximate: a descent direction where f is a sufficiently strong contraction. No backward
    solve.

    The same as one undamped step of `Phantom`, in higher derivatives too: these treat z_sol as a
    constant, and need not be a descent direction.
    """

    def close(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        output = f(forward.value)
        return Equilibrium(output, output - forward.value, forward)
