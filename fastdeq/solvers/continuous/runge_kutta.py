"""One trial step of an explicit Runge–Kutta pair."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeq.solvers.base import Problem
from fastdeq.solvers.continuous.tableaux import Tableau
from fastdeq.solvers.termination import Iterate


@dataclass(frozen=True)
class Trial:
    """A proposed step: where it leads and its local error, (B, D).

    known: (B,) for which samples the derivative there is known; None for all.
    """

    end: Iterate
    error: Tensor
    known: Tensor | None = None


@dataclass(frozen=True)
class RungeKutta:
    """z₊ = z + h Σ bᵢ kᵢ, kᵢ = g(z + h Σⱼ aᵢⱼ kⱼ); the last stage is the derivative at z₊."""

    tableau: Tableau

    @property
    def order(self) -> int:
        """Order of the error estimate's method plus one, for step-size control."""
        return self.tableau.order

    def start(self, first: Iterate) -> None:
        """No memory: a step depends on its start alone."""
        return None

    def propose(
        self, problem: Problem, at: Iterate, h: Tensor, memory: None, rows: Tensor | None = None
    ) -> Trial:
        """A step of size h (B,) for the active samples, or for those in `rows`."""
        width = h[:, None]
        stages, reached = [at.g], at
        for weights in self.tableau.a:
            slope = sum(a * k for a, k in zip(weights, stages, strict=True))
            reached = problem.evaluate(at.z + width * slope, rows)
            stages.append(reached.g)
        error = sum(e * k for e, k in zip(self.tableau.error, stages, strict=True))
        return Trial(reached, torch.as_tensor(width * error))

    def accepted(self, memory: None, at: Iterate, h: Tensor, rows: Tensor) -> None:
        """Nothing to remember."""
        return None
