"""Batched, matrix-free linear solves."""

from fastdeq.krylov.gmres import GMRES, closest_multiple, gmres

__all__ = ["GMRES", "closest_multiple", "gmres"]
