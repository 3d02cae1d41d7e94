"""Good Broyden with the dense inverse Jacobian, for small D."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeq.history import project, safe_inverse
from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.line_search import norm_descent
from fastdeq.solvers.termination import Iterate


@dataclass(frozen=True)
class _Inverse:
    """B ≈ (∂g/∂z)⁻¹, (B, D, D), and how many steps were taken."""

    matrix: Tensor
    count: int


@settings
class BroydenSolver(AbstractSolver):
    """z ← z − α B g, B ← B + (dz − B dg)(dzᵀ B) / (dzᵀ B dg) from B = −I (Broyden 1965, the good
    method), α by norm descent (Li & Fukushima 2000).

    line_search_steps: shorter steps tried at most; 0 switches the search off.
    max_dim: the largest D taken; a sample's inverse Jacobian holds D² numbers.
    One evaluation per step, and one for every shorter step tried.

    Raises (in a solve): ValueError for D above `max_dim`.

    Departures from the references:
    1. The search is short, and where it fails the best trial is taken: long searches end in minima
       of ‖g‖ that are not equilibria.
    2. An update whose denominator vanishes to rounding is skipped for that sample.
    """

    line_search_steps: int = setting(default=2, at_least=0)
    max_dim: int = setting(default=2048, at_least=1)

    def init(self, problem: Problem, first: Iterate) -> _Inverse:
        size = first.z.shape[1]
        if size > self.max_dim:
            raise ValueError(
                f"BroydenSolver keeps a dense {size} × {size} inverse Jacobian per sample, but "
                f"max_dim is {self.max_dim}: use LimitedMemoryBroydenSolver, or raise max_dim"
            )
        return _Inverse(_minus_identity(first.z), 0)

    def step(self, problem: Problem, current: Iterate, memory: _Inverse) -> tuple[Step, _Inverse]:
        direction = -project(memory.matrix, current.g)
        slack = 1.0 / (1 + memory.count) ** 2  # summable, as the theory of the search requires
        new = norm_descent(problem, current, direction, slack, self.line_search_steps)
        matrix = _update(memory.matrix, new.z - current.z, new.g - current.g)
        return Step(new), _Inverse(matrix, memory.count + 1)

    def adjoint_estimate(self, memory: _Inverse, w: Tensor) -> Tensor:
        """−Bᵀ w, which estimates (I − Jᵀ)⁻¹ w, both (B, D). memory: after the last step."""
        return -project(memory.matrix.mT, w)


def _minus_identity(z: Tensor) -> Tensor:
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return -eye.expand(len(z), -1, -1)


def _update(matrix: Tensor, dz: Tensor, dg: Tensor) -> Tensor:
    """The rank-one update that makes B dg = dz, (B, D, D)."""
    left = dz - project(matrix, dg)
    right = project(matrix.mT, dz)
    u = left * safe_inverse(right, dg)[:, None]
    add = (
        matrix.baddbmm if torch.is_grad_enabled() else matrix.baddbmm_
    )  # the old matrix is not read
    return add(u[:, :, None], right[:, None, :])
