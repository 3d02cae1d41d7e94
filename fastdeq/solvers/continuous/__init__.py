"""L1: continuous solvers."""

from fastdeq.solvers.continuous.solver import ContinuousSolver

__all__ = ["ContinuousSolver"]
