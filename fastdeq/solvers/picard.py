"""Picard iteration."""

import torch

from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.termination import Iterate


@settings
class Picard(AbstractSolver):
    """z ← (1 − β) z + β f(z); converges where β keeps (1 − β) I + β J a contraction.

    damping: β in (0, 1]; below 1 it also reaches some equilibria at which f is not a contraction.
    One evaluation per step.
    """

    compiles_steps = takes_one_evaluation = True

    damping: float = setting(default=1.0, above=0, at_most=1)

    def init(self, problem: Problem, first: Iterate) -> None:
        return None

    def step(self, problem: Problem, current: Iterate, memory: None) -> tuple[Step, None]:
        return Step(problem.evaluate(torch.add(current.z, current.g, alpha=self.damping))), None
