"""Anderson acceleration."""

import torch
from torch import Tensor

from fastdeq.autodiff import is_recorded
from fastdeq.history import History, add_combination, project
from fastdeq.norms import sample_norm
from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.termination import Iterate

_AT_REST = 1e-30  # length below which a sample counts as at rest: its row stays zero


class _Differences:
    """Of residuals, ΔG, and of damped steps, ΔZ + β ΔG: k rows each, both divided by the length of
    the row of ΔG; and the Gram matrix of ΔG with the ridge on its diagonal, (B, k, k), float64.

    A sample at rest has a row of zeros, which gets coefficient 0.
    """

    def __init__(self, memory: int, ridge: float) -> None:
        self.dg, self.moves = History(memory), History(memory)
        self.ridge = ridge
        self._gram: Tensor | None = None

    def push(self, dg: Tensor, move: Tensor) -> None:
        """Add a row to each, (B, D)."""
        # Not differentiated: it cancels, and has no slope for a sample at rest.
        inverse = sample_norm(dg.detach()).clamp_min(_AT_REST).reciprocal()[:, None]
        place = self.dg.push(dg, inverse)
        self.moves.push(move, inverse)
        if is_recorded(dg):
            self._gram = self._whole_gram()
            return
        rows, k = self.dg.rows, len(self.dg)
        if self._gram is None:
            memory = self.dg.memory
            self._gram = dg.new_empty(dg.shape[0], memory, memory, dtype=torch.float64)
        overlap = project(rows, rows[:, place])
        overlap[:, place].fill_(1 + self.ridge)
        self._gram[:, place, :k] = overlap
        self._gram[:, :k, place] = overlap

    def _whole_gram(self) -> Tensor:
        rows = self.dg.rows
        gram = torch.bmm(rows, rows.mT).double()
        resting = gram.detach().diagonal(dim1=1, dim2=2) == 0
        return gram + torch.diag_embed(resting + self.ridge)

    def coefficients(self, g: Tensor) -> Tensor:
        """(B, k) coefficients that combine the rows of ΔG to g (B, D), per sample."""
        assert self._gram is not None
        k = len(self.dg)
        right = project(self.dg.rows, g).double()
        # The _ex form does not raise for the whole batch where one sample is singular (without a
        # ridge); that sample takes the plain damped step.
        solution, _ = torch.linalg.solve_ex(self._gram[:, :k, :k], right[:, :, None])
        found: Tensor = solution[:, :, 0].nan_to_num(0.0, 0.0, 0.0).to(g.dtype)
        return found


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
       states. A step adds one row to the matrix.
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
        return _Differences(self.memory, self.ridge)

    def step(
        self, problem: Problem, current: Iterate, memory: _Differences
    ) -> tuple[Step, _Differences]:
        update = current.g if self.damping == 1 else self.damping * current.g
        if len(memory.dg):
            gamma = memory.coefficients(current.g)
            update = add_combination(update, memory.moves.rows, gamma, scale=-1.0)
        new = problem.evaluate(current.z + update)
        dg = new.g - current.g
        memory.push(dg, torch.add(update, dg, alpha=self.damping))
        return Step(new), memory
