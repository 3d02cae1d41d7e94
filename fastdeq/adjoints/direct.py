"""Implicit differentiation by a dense factorization, for small states."""

from torch import Tensor

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium
from fastdeq.adjoints.closing import Closing
from fastdeq.adjoints.linear import DenseSolve
from fastdeq.notation import FlatMap
from fastdeq.settings import setting, settings
from fastdeq.solution import Recording, SolveResult
from fastdeq.solvers import AbstractSolver


@settings
class Direct(AbstractAdjoint):
    """v with (I − Jᵀ) v = w, by J as a matrix and its LU factorization.

    max_dim: the most rows of a matrix.
    per_sample: one (D, D) matrix for each sample. For a cell that couples the samples of a batch,
        False: one (B D, B D) matrix.
    order: as in `Implicit`.

    Exact to rounding, whatever the spectrum of J. D products with Jᵀ (B D of them with
    `per_sample=False`), all from one evaluation of f, and a matrix of D² numbers per sample, or
    (B D)². A sample whose matrix is singular falls back to v = w with a warning.

    Raises: ValueError, before the solve, for states above `max_dim`.
    """

    max_dim: int = setting(default=512, at_least=1)
    per_sample: bool = setting(default=True)
    order: int = setting(default=1, at_least=1)

    def equilibrium(
        self, f: FlatMap, z0: Tensor, solver: AbstractSolver, record: Recording
    ) -> Equilibrium:
        self._solver.check(z0)
        return super().equilibrium(f, z0, solver, record)

    def close(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        return Closing(self._solver, "Direct", self.order).equilibrium(f, forward)

    @property
    def _solver(self) -> DenseSolve:
        return DenseSolve(max_dim=self.max_dim, per_sample=self.per_sample)
