"""Anderson acceleration."""

from typing import TypeAlias

import torch
from torch import Tensor

from fastdeq.autodiff import is_recorded
from fastdeq.history import FixedHistory, History, HistoryDtype, add_combination, project
from fastdeq.norms import sample_norm
from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step, check_history
from fastdeq.solvers.termination import Iterate

_WRITTEN_OUT = 6  # rows; the code of larger systems takes long to compile
_AT_REST = 1e-30  # length below which a sample counts as at rest: its row stays zero


class _Differences:
    """Of residuals, ΔG, and of damped steps, ΔZ + β ΔG: k rows each, both divided by the length of
    the row of ΔG; and the Gram matrix of ΔG with the ridge on its diagonal, (B, k, k), float64.

    A sample at rest has a row of zeros, which gets coefficient 0.
    """

    def __init__(self, memory: int, ridge: float, dtype: HistoryDtype | None) -> None:
        self.dg, self.moves = History(memory, dtype), History(memory, dtype)
        self.ridge = ridge
        self._gram: Tensor | None = None

    def push(self, dg: Tensor, move: Tensor) -> None:
        """Add a row to each, (B, D)."""
        # Not differentiated: it cancels, and has no slope for a sample at rest.
        inverse = sample_norm(dg.detach()).clamp_min(_AT_REST).reciprocal()[:, None]
        place = self.dg.push(dg, inverse)
        self.moves.push(move, inverse)
        if is_recorded(dg):
            self._gram = self._whole_gram(dg.dtype)
            return
        rows, k = self.dg.rows, len(self.dg)
        if self._gram is None:
            memory = self.dg.memory
            self._gram = dg.new_empty(dg.shape[0], memory, memory, dtype=torch.float64)
        overlap = project(rows, rows[:, place].to(dg.dtype))
        if rows.dtype == dg.dtype:
            overlap[:, place].fill_(1 + self.ridge)
        else:  # rounded rows are not of length 1
            overlap[:, place] += self.ridge + (overlap[:, place] == 0)
        self._gram[:, place, :k] = overlap
        self._gram[:, :k, place] = overlap

    def _whole_gram(self, dtype: torch.dtype) -> Tensor:
        rows = self.dg.rows.to(dtype)
        gram = torch.bmm(rows, rows.mT).double()
        resting = gram.detach().diagonal(dim1=1, dim2=2) == 0
        return gram + torch.diag_embed(resting + self.ridge)

    def accelerated(self, update: Tensor, g: Tensor) -> Tensor:
        """update − (ΔZ + β ΔG) γ, (B, D), with the γ that combines the rows of ΔG to g (B, D), per
        sample."""
        if self._gram is None:
            return update
        k = len(self.dg)
        right = project(self.dg.rows, g).double()
        # The _ex form does not raise for the whole batch where one sample is singular (without a
        # ridge); that sample takes the plain damped step.
        solution, _ = torch.linalg.solve_ex(self._gram[:, :k, :k], right[:, :, None])
        gamma = solution[:, :, 0].nan_to_num(0.0, 0.0, 0.0).to(g.dtype)
        return add_combination(update, self.moves.rows, gamma, scale=-1.0)


class _FixedDifferences:
    """The same with tensors of fixed shape, for compiled solves: rows that are not used yet are
    zero and get coefficient 0, as those of a sample at rest."""

    def __init__(self, memory: int, ridge: float, like: Tensor) -> None:
        self.dg, self.moves = FixedHistory(memory, like), FixedHistory(memory, like)
        self.ridge = ridge
        unit = torch.eye(memory, dtype=torch.float64, device=like.device)
        self._gram = (1 + ridge) * unit.repeat(len(like), 1, 1)

    def push(self, dg: Tensor, move: Tensor) -> None:
        """Add a row to each, (B, D)."""
        inverse = sample_norm(dg).clamp_min(_AT_REST).reciprocal()[:, None]
        place = self.dg.push(dg, inverse)
        self.moves.push(move, inverse)
        overlap = project(self.dg.rows, dg * inverse).double()
        overlap = overlap.index_fill(1, place, 1 + self.ridge)
        gram = self._gram.index_copy(1, place, overlap[:, None])
        self._gram = gram.index_copy(2, place, overlap[:, :, None])

    def accelerated(self, update: Tensor, g: Tensor) -> Tensor:
        """As `_Differences.accelerated`."""
        right = project(self.dg.rows, g).double()
        gamma = _solve_small(self._gram, right).nan_to_num(0.0, 0.0, 0.0).to(g.dtype)
        return add_combination(update, self.moves.rows, gamma, scale=-1.0)


_Memory: TypeAlias = _Differences | _FixedDifferences


@settings
class Anderson(AbstractSolver):
    """z ← z + β g − (ΔZ + β ΔG) γ with γ = argmin ‖g − ΔG γ‖ for each sample (Walker & Ni 2011, eq.
    2.3; for equilibrium models Bai et al. 2019).

    memory: m, how many differences are kept; the oldest is dropped.
    ridge: λ, relative: added to the diagonal of the Gram matrix of normalized differences.
    damping: β in (0, 1], the weight of the residual in the mixed step.
    history: "bfloat16" keeps the differences in half the memory; states, the Gram matrix and all
        arithmetic stay as they are. A step then reduces the residual at most by a factor of about
        500, the rounding of bfloat16. None: the dtype of the states.
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

    compiles_steps = takes_one_evaluation = True

    memory: int = setting(default=5, at_least=1)
    ridge: float = setting(default=1e-6, at_least=0)
    damping: float = setting(default=1.0, above=0, at_most=1)
    history: HistoryDtype | None = setting(default=None)

    def validate(self) -> None:
        """Also refuse a history in another dtype for compiled steps."""
        super().validate()
        check_history(self)

    def init(self, problem: Problem, first: Iterate) -> _Memory:
        if problem.fixed_shapes:
            return _FixedDifferences(self.memory, self.ridge, first.z)
        return _Differences(self.memory, self.ridge, self.history)

    def step(self, problem: Problem, current: Iterate, memory: _Memory) -> tuple[Step, _Memory]:
        update = current.g if self.damping == 1 else self.damping * current.g
        update = memory.accelerated(update, current.g)
        new = problem.evaluate(current.z + update)
        dg = new.g - current.g
        memory.push(dg, torch.add(update, dg, alpha=self.damping))
        return Step(new), memory


def _solve_small(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of symmetric positive definite systems, (B, m, m) and (B, m).

    Written out entry by entry up to a size, by the LDLᵀ factorization: compiled, that is one fused
    operation instead of a call of LAPACK for every step. NaN where the matrix is singular.
    """
    m = right.shape[1]
    if m > _WRITTEN_OUT:
        solution: Tensor = torch.linalg.solve_ex(matrix, right[:, :, None])[0]
        return solution[:, :, 0]
    lower = [[matrix[:, i, j] for j in range(i + 1)] for i in range(m)]
    x = list(right.unbind(1))
    pivots = []
    for j in range(m):
        pivots.append(lower[j][j].reciprocal())
        for i in range(j + 1, m):
            factor = lower[i][j] * pivots[j]
            x[i] = x[i] - factor * x[j]
            for k in range(j + 1, i + 1):
                lower[i][k] = lower[i][k] - factor * lower[k][j]
    for i in reversed(range(m)):
        for k in range(i + 1, m):
            x[i] = x[i] - lower[k][i] * x[k]
        x[i] = x[i] * pivots[i]
    return torch.stack(x, dim=1)
