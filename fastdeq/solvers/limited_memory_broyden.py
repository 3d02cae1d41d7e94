"""L1: limited-memory good Broyden, the solver of the published experiments."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.history import combine, project, push, safe_inverse
from fastdeq.solvers.termination import Iterate


@dataclass(frozen=True)
class _LowRank:
    """B = −I + Σ uᵢ vᵢᵀ with u, v (B, k, D), and the step −B g that is due, (B, D)."""

    direction: Tensor
    u: Tensor | None = None
    v: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """B x."""
        return -x if self.u is None or self.v is None else combine(self.u, project(self.v, x)) - x

    def apply_transposed(self, x: Tensor) -> Tensor:
        """Bᵀ x."""
        return -x if self.u is None or self.v is None else combine(self.v, project(self.u, x)) - x


@settings
class LimitedMemoryBroydenSolver(AbstractSolver):
    """z ← z − B g with B ≈ (∂g/∂z)⁻¹ held as −I plus rank-one terms (Broyden 1965, the good method;
    as in MDEQ, Bai et al. 2020, arXiv 2006.08656).

    memory: rank-one terms kept. When they are full the method restarts from −I at the current
        state: a sum without its oldest terms would no longer satisfy any secant equation. One
        evaluation a step; no line search, as in the reference.

    Departures from the reference:
    1. u = (dz − B dg) / (v · dg) is computed as −B g₊ / (v · dg), since B g = −dz: one product with
       B serves the update and, corrected by it, the next step.
    2. An update whose denominator vanishes to rounding is skipped for that sample.
    """

    memory: int = setting(default=20, at_least=1)

    def init(self, problem: Problem, first: Iterate) -> _LowRank:
        return _LowRank(direction=first.g)

    def step(self, problem: Problem, current: Iterate, memory: _LowRank) -> tuple[Step, _LowRank]:
        dz = memory.direction
        new = problem.evaluate(current.z + dz)
        if memory.u is not None and memory.u.shape[1] == self.memory:
            return Step(new), _LowRank(direction=new.g)
        v = memory.apply_transposed(dz)
        product = memory.apply(new.g)
        u = -product * safe_inverse(v, new.g - current.g)[:, None]
        # B₊ g₊ = B g₊ + u (v · g₊)
        direction = -product - u * torch.linalg.vecdot(v, new.g)[:, None]
        return Step(new), _LowRank(
            direction, push(memory.u, u, self.memory), push(memory.v, v, self.memory)
        )
