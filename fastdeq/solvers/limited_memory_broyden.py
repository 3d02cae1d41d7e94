"""Limited-memory good Broyden, the solver of the published discrete runs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeq.history import History, add_combination, project, safe_inverse
from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.termination import Iterate


@dataclass(frozen=True)
class _LowRank:
    """B = −I + Σ uᵢ vᵢᵀ with k rows u and v, and the next step −B g, (B, D)."""

    direction: Tensor
    u: History
    v: History

    def minus_apply(self, x: Tensor) -> Tensor:
        """−B x."""
        if not len(self.u):
            return x
        return add_combination(x, self.u.rows, project(self.v.rows, x), scale=-1.0)

    def apply_transposed(self, x: Tensor) -> Tensor:
        """Bᵀ x."""
        if not len(self.u):
            return -x
        return add_combination(x, self.v.rows, project(self.u.rows, x), keep=-1.0)

    def restarted(self, g: Tensor) -> "_LowRank":
        """B = −I again."""
        self.u.clear()
        self.v.clear()
        return _LowRank(g, self.u, self.v)

    def extended(self, direction: Tensor, u: Tensor, v: Tensor) -> "_LowRank":
        """With one more term."""
        self.u.push(u)
        self.v.push(v)
        return _LowRank(direction, self.u, self.v)


@settings
class LimitedMemoryBroydenSolver(AbstractSolver):
    """z ← z − B g with B ≈ (∂g/∂z)⁻¹ held as −I plus rank-one terms (Broyden 1965, the good method;
    as in MDEQ, Bai et al. 2020, arXiv 2006.08656).

    memory: rank-one terms kept. When they are full the method restarts from −I at the current
        state: a sum without its oldest terms would no longer satisfy any secant equation. One
        evaluation per step; no line search, as in the reference.

    Departures from the reference:
    1. u = (dz − B dg) / (v · dg) is computed as −B g₊ / (v · dg), since B g = −dz: one product with
       B serves the update and, corrected by it, the next step.
    2. An update whose denominator vanishes to rounding is skipped for that sample.
    """

    takes_one_evaluation = True

    memory: int = setting(default=20, at_least=1)

    def init(self, problem: Problem, first: Iterate) -> _LowRank:
        return _LowRank(first.g, History(self.memory), History(self.memory))

    def step(self, problem: Problem, current: Iterate, memory: _LowRank) -> tuple[Step, _LowRank]:
        dz = memory.direction
        new = problem.evaluate(current.z + dz)
        if len(memory.u) == self.memory:
            return Step(new), memory.restarted(new.g)
        v = memory.apply_transposed(dz)
        newton = memory.minus_apply(new.g)
        u = newton * safe_inverse(v, new.g - current.g)[:, None]
        # −B₊ g₊ = −B g₊ − u (v · g₊)
        along = torch.linalg.vecdot(v, new.g)[:, None]
        direction = torch.addcmul(newton, u, along, value=-1.0)
        return Step(new), memory.extended(direction, u, v)
