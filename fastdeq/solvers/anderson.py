"""Anderson acceleration."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeq.history import History, add_combination, project
from fastdeq.norms import finite
from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.termination import Iterate


@dataclass(frozen=True)
class _Differences:
    """Of residuals, ΔG, and of damped steps, ΔZ + β ΔG: k rows each."""

    dg: History
    moves: History


@settings
class Anderson(AbstractSolver):
    """z ← z + β g − (ΔZ + β ΔG) γ with γ = argmin ‖g − ΔG γ‖ for each sample (Walker & Ni 2011, eq.
    2.3; for equilibrium models Bai et al. 2019).

    memory: m, how many differences are kept; the oldest is dropped.
    ridge: λ, relative: added to the diagonal of the Gram matrix of normalized differences.
    damping: β in (0, 1], the weight of the residual in the mixed step.
    One evaluation per step.

    Departures from the reference:
    1. The least-squares problem is solved from the normalized Gram matrix in float64 instead of by
       an updated QR factorization: k × k algebra per sample, batched, for every dtype of the
       states.
    2. The ridge is relative to the columns' lengths. An absolute one, as in the usual
       implementations for equilibrium models, outweighs the data as the residuals shrink, and the
       method decays to averaging at a tight tolerance. It must stay above the
       rounding of the Gram matrix, else the coefficients of dependent columns are noise.
    """

    takes_one_evaluation = True

    memory: int = setting(default=5, at_least=1)
    ridge: float = setting(default=1e-6, at_least=0)
    damping: float = setting(default=1.0, above=0, at_most=1)

    def init(self, problem: Problem, first: Iterate) -> _Differences:
        return _Differences(History(self.memory), History(self.memory))

    def step(
        self, problem: Problem, current: Iterate, memory: _Differences
    ) -> tuple[Step, _Differences]:
        update = self.damping * current.g
        if len(memory.dg):
            gamma = _least_squares(memory.dg.rows, current.g, self.ridge)
            update = add_combination(update, memory.moves.rows, gamma, scale=-1.0)
        new = problem.evaluate(current.z + update)
        dg = new.g - current.g
        memory.dg.push(dg)
        memory.moves.push(torch.add(new.z - current.z, dg, alpha=self.damping))
        return Step(new), memory


def _least_squares(rows: Tensor, target: Tensor, ridge: float) -> Tensor:
    """(B, k) coefficients that combine `rows` (B, k, D) to `target` (B, D), per sample."""
    gram = torch.bmm(rows, rows.mT).double()
    # The scaling is not differentiated: it cancels, and √ has no slope for a sample at rest.
    length = gram.detach().diagonal(dim1=1, dim2=2).sqrt()
    length = length.masked_fill(length == 0, 1.0)
    normal = gram / (length[:, :, None] * length[:, None, :])
    # An all-zero row (a sample at rest) gets coefficient 0 from a unit diagonal.
    resting = ~(normal.detach().diagonal(dim1=1, dim2=2) > 0)
    damp = torch.full_like(length, ridge).masked_fill(resting, 1.0)
    right = project(rows, target).double() / length
    # The _ex form does not raise for the whole batch where one sample is singular (without a
    # ridge); that sample takes the plain damped step.
    solution, _ = torch.linalg.solve_ex(normal + torch.diag_embed(damp), right[:, :, None])
    solution = solution.masked_fill(~finite(solution.sum(dim=1, keepdim=True)), 0.0)
    coefficients: Tensor = solution[:, :, 0] / length
    return coefficients.to(rows.dtype)
