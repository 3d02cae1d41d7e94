"""Ways to solve, or to approximate, (I − P) v = w that are not iterations of a solver."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeq.adjoints.resolvent import LinearSolver
from fastdeq.norms import sample_norm
from fastdeq.notation import FlatMap
from fastdeq.solution import SolveResult, Status


@dataclass(frozen=True, kw_only=True)
class NeumannSeries(LinearSolver):
    """v = Σ_{i ≤ steps} Pⁱ w."""

    steps: int

    def solve(self, product: FlatMap, w: Tensor) -> Tensor:
        """v, (B, D)."""
        v = w
        for _ in range(self.steps):
            v = w + product(v)
        return v


@dataclass(frozen=True, kw_only=True)
class DenseSolve(LinearSolver):
    """I − P as a matrix, by products with all unit vectors, and its LU factorization.

    per_sample: a (D, D) matrix per sample; False: one (B D, B D) matrix of the whole batch.
    max_dim: the most rows of a matrix.
    """

    max_dim: int

    def check(self, z0: Tensor) -> None:
        """Raises: ValueError for a matrix with more rows than `max_dim`."""
        size = z0.shape[1] if self.per_sample else z0.numel()
        if size > self.max_dim:
            raise ValueError(
                f"the Direct adjoint would factorize matrices of {size} rows, but max_dim is "
                f"{self.max_dim}: use the Implicit adjoint, or raise max_dim"
            )

    def solve(self, product: FlatMap, w: Tensor) -> SolveResult:
        """v, and how well the equation holds."""
        size = w.shape[1] if self.per_sample else w.numel()
        unit = torch.eye(size, dtype=w.dtype, device=w.device)
        if self.per_sample:
            columns = [product(e.expand_as(w)) for e in unit]
            p, right = torch.stack(columns, dim=2), w
        else:
            columns = [product(e.view_as(w)).reshape(-1) for e in unit]
            p, right = torch.stack(columns, dim=1)[None], w.reshape(1, size)
        v, _ = torch.linalg.solve_ex(unit - p, right)
        left = right - v + (p @ v[:, :, None])[:, :, 0]
        return _record(w, v.view_as(w), left.view_as(w), products=size)


def _record(w: Tensor, v: Tensor, left: Tensor, products: int) -> SolveResult:
    usable = torch.isfinite(v).all(dim=1)
    residual, scale = sample_norm(left), sample_norm(w)
    status = torch.where(usable, int(Status.CONVERGED), int(Status.DIVERGED))
    return SolveResult(
        value=torch.where(usable[:, None], v, 0.0),
        residual=residual,
        relative_residual=(residual / scale).masked_fill(scale == 0, 0.0),
        steps=torch.ones_like(status),
        nfe=torch.full_like(status, products),
        status=status,
    )
