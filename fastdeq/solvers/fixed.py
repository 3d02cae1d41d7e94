"""A fixed number of steps, without a decision on the host: what can be exported."""

import torch
from torch import Tensor

from fastdeq.autocast import full_precision
from fastdeq.norms import finite
from fastdeq.notation import FlatMap
from fastdeq.solvers.base import AbstractSolver, Problem
from fastdeq.solvers.termination import _FALLEN, Iterate


def iterate(solver: AbstractSolver, f: FlatMap, z0: Tensor, steps: int) -> Tensor:
    """The state that `solve` with max_steps=steps returns, (B, D), after exactly `steps` steps.

    A sample that meets the tolerance keeps the state at which it does; f and the method see its
    later iterates. Stalls, and the protective bounds of divergence, end no sample here: such a
    sample returns its best finite state.
    """
    with full_precision(f, z0.device) as guarded:
        problem = Problem(guarded, z0, solver.pooling, guarded=solver.guarded)
        at = problem.evaluate(z0)
        memory, kept = solver.init(problem, at), _Kept(solver, at)
        for _ in range(steps):
            step, memory = solver.step(problem, at, memory)
            at = step.iterate
            kept.take(at)
    return kept.z


class _Kept:
    """The best iterate of every sample, by tensors alone; the tests are those of `Progress`."""

    def __init__(self, solver: AbstractSolver, first: Iterate) -> None:
        self.solver, self.taken = solver, -1
        self.z = first.z
        unknown = torch.full_like(first.residual, torch.inf)
        self.best = self.peak = self.bound = unknown
        self.active = torch.ones_like(unknown, dtype=torch.bool)
        self.take(first)

    def take(self, at: Iterate) -> None:
        rule, pooling = self.solver.rule, self.solver.pooling
        m = rule.measure(at).pooled(rule, pooling, torch.ones_like(self.active))
        beyond = m.size > self.bound
        scale = torch.minimum(m.size, self.bound)
        passed = rule.passed(at, m, self.bound if rule.mode == "rel" else scale)
        if pooling.shared:
            passed = passed.all().expand_as(passed)
        self.taken += 1
        if self.taken < (self.solver.min_steps or 0):
            passed = torch.zeros_like(passed)
        better = m.du <= self.best if rule.returns_best else torch.ones_like(passed)
        better = better & ~(beyond & (m.du > _FALLEN * self.peak))
        better = self.active & (better | passed) & finite(m.du)
        self.z = torch.where(better[:, None], at.z, self.z)
        self.best = torch.where(better, m.du, self.best)
        self.active = self.active & ~passed
        self._move_bounds(m.du, m.size)

    def _move_bounds(self, du: Tensor, size: Tensor) -> None:
        first = not self.taken
        if first:
            self.first_size = size
        self.peak = du if first else torch.maximum(self.peak, du)
        self.bound = torch.add(self.first_size, self.peak, alpha=self.solver.rule.growth)
