"""A fixed number of steps, without a decision on the host: what can be exported."""

from torch import Tensor

from fastdeq.autocast import full_precision
from fastdeq.notation import FlatMap
from fastdeq.solvers.base import AbstractSolver, Problem
from fastdeq.solvers.compiled import stepped
from fastdeq.solvers.termination import Progress


def iterate(solver: AbstractSolver, f: FlatMap, z0: Tensor, steps: int) -> Tensor:
    """The state that `solve` with max_steps=steps returns, (B, D), after exactly `steps` steps.

    A sample that ends earlier keeps its state; f is evaluated there from then on. Stalls are not
    tested.
    """
    pooling = solver.pooling
    with full_precision(f, z0.device) as guarded:
        problem = Problem(guarded, z0, pooling, guarded=pooling.shared)
        progress = Progress(solver.rule, pooling, z0, solver.min_steps or 0, on_host=False)
        at, best_z = problem.evaluate(z0), z0
        memory = solver.init(problem, at)
        progress.test(at, solver.rule.measure(at))
        for _ in range(steps):
            at, best_z, memory, _ = stepped(solver, problem, progress, at, best_z, memory)
    return best_z
