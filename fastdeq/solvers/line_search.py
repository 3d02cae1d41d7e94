"""The derivative-free norm-descent line search of Li & Fukushima (2000), per sample."""

import torch
from torch import Tensor

from fastdeq.solvers.base import Problem
from fastdeq.solvers.termination import Iterate

_DECREASE = 1e-3  # σ: required decrease per squared length of the step
_SHRINK = 0.5  # factor of the step length from one trial to the next


def norm_descent(
    problem: Problem, current: Iterate, direction: Tensor, slack: float, trials: int
) -> Iterate:
    """Shrink α from 1 until ‖g(z + α d)‖ ≤ (1 + η) ‖g(z)‖ − σ ‖α d‖² (Li & Fukushima 2000, §2).

    The last term, which keeps steps from growing without bound, has the units of z², as in the
    reference: states far from order 1 need more trials.

    direction: d, (B, D). slack: η ≥ 0; over a solve the slacks must have a finite sum. trials:
    shorter steps tried at most after the full one. Each sample has its own α; evaluations are
    counted only for the samples still searching.

    Returns the trial that ended the search or, where none did, the one with the smallest residual:
    the shortest is often a poor one, and a non-monotone step that is not too bad often recovers.
    """
    before, length = problem.residual(current), problem.norm(direction)
    best = problem.evaluate(current.z + direction)
    lowest = problem.residual(best)
    alpha = 1.0
    found = _descends(before, lowest, alpha * length, slack)
    for _ in range(trials):
        searching = problem.active & ~found
        # Waits for the device; each trial saved is an evaluation of f.
        if not bool(searching.any()):
            break
        alpha *= _SHRINK
        trial = problem.evaluate(current.z + alpha * direction, searching)
        reached = problem.residual(trial)
        better = searching & ~(reached >= lowest)  # also when the lowest so far is NaN
        best = Iterate(
            torch.where(better[:, None], trial.z, best.z),
            torch.where(better[:, None], trial.g, best.g),
        )
        lowest = torch.where(better, reached, lowest)
        found = found | _descends(before, reached, alpha * length, slack)
    return best


def _descends(before: Tensor, after: Tensor, length: Tensor, slack: float) -> Tensor:
    return after <= (1 + slack) * before - _DECREASE * length**2
