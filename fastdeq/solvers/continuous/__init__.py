"""Continuous solvers."""

from fastdeq.solvers.continuous.solver import ContinuousSolver

__all__ = ["ContinuousSolver"]
