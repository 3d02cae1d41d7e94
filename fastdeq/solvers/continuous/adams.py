"""The variable-coefficient Adams–Bashforth method of order 3."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeq.solvers.base import Problem
from fastdeq.solvers.continuous.runge_kutta import RungeKutta, Trial
from fastdeq.solvers.continuous.tableaux import BS3
from fastdeq.solvers.termination import Iterate


@dataclass(frozen=True)
class Past:
    """The two derivatives before the current one, (B, D), and the steps between the three, (B,).

    count: (B,) how many of the two are known.
    """

    g1: Tensor
    g2: Tensor
    h1: Tensor
    h2: Tensor
    count: Tensor


class AdamsBashforth3:
    """z₊ = z + ∫₀ʰ p with p the quadratic through the last three derivatives, in Newton's form on
    their own unequal grid (Hairer, Nørsett & Wanner, Solving ODEs I, §III.5); one evaluation per
    step. The local error is the difference of orders 3 and 2. Every sample has its own grid; until
    a sample has three derivatives, BS3 steps it.
    """

    order = 3
    _starter = RungeKutta(BS3)

    def start(self, first: Iterate) -> Past:
        """No past yet."""
        zero, none = torch.zeros_like(first.g), torch.ones_like(first.g[:, 0])
        return Past(zero, zero, none, none, torch.zeros_like(none, dtype=torch.int64))

    def propose(self, problem: Problem, at: Iterate, h: Tensor, memory: Past) -> Trial:
        """A step of size h (B,): BS3 for samples still starting, else Adams–Bashforth.

        The latter needs no evaluation for its error, so the derivative at its end is left unknown.
        """
        starting = problem.active & (memory.count < 2)
        end, error = _extrapolate(at, h, memory)
        if not bool(starting.any()):  # waits for the device; saves three evaluations per step
            return Trial(Iterate(end, at.g), error, torch.zeros_like(starting))
        first = self._starter.propose(problem, at, h, None, starting)
        rows = starting[:, None]
        end = torch.where(rows, first.end.z, end)
        error = torch.where(rows, first.error, error)
        return Trial(Iterate(end, first.end.g), error, starting)

    def accepted(self, memory: Past, at: Iterate, h: Tensor, rows: Tensor) -> Past:
        """Shift the history of the samples in `rows` (B,) by the step just taken from `at`."""
        wide = rows[:, None]
        return Past(
            g1=torch.where(wide, at.g, memory.g1),
            g2=torch.where(wide, memory.g1, memory.g2),
            h1=torch.where(rows, h, memory.h1),
            h2=torch.where(rows, memory.h1, memory.h2),
            count=memory.count + rows,
        )


def _extrapolate(at: Iterate, h: Tensor, past: Past) -> tuple[Tensor, Tensor]:
    """The end of the step and its order 2–3 difference, both (B, D)."""
    h, h1, h2 = h[:, None], past.h1[:, None], past.h2[:, None]
    slope = (at.g - past.g1) / h1
    bend = (slope - (past.g1 - past.g2) / h2) / (h1 + h2)
    # ∫₀ʰ of 1, t and t (t + h1)
    error = bend * (h**3 / 3 + h1 * h**2 / 2)
    return at.z + h * at.g + slope * h**2 / 2 + error, error
