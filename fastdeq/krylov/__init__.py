"""Batched, matrix-free linear solves."""

from fastdeq.krylov.gmres import GMRES, gmres

__all__ = ["GMRES", "gmres"]
