"""The loop of all solvers. It counts, tests, freezes and keeps the best iterate; methods only step.

Departures from a plain `while residual > tol`:
1. Every sample ends on its own and its state is frozen from then on, so a batch gives the results
   of its samples alone.
2. A sample that becomes non-finite, grows past the protective factor, or runs away while its
   residual does not fall (see `termination.py`) is set back to its last good iterate and marked;
   the others are not affected.
3. Whether all samples are done is read from the device only every `check_every` steps; until then
   the loop continues, which changes nothing for frozen samples.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fastdeq.autocast import full_precision
from fastdeq.flatten import check_floating
from fastdeq.norms import finite
from fastdeq.notation import FlatMap
from fastdeq.solution import SolveResult, Status, Trace, TraceKind
from fastdeq.solvers.base import AbstractSolver, Problem
from fastdeq.solvers.termination import Iterate, Measures, Progress, ratio
from fastdeq.timer import Stopwatch

_RUNNING = -1  # a status that no finished sample has


def solve(
    solver: AbstractSolver, f: FlatMap, z0: Tensor, *, trace: TraceKind | None = None
) -> SolveResult:
    """Iterate `solver` on f from z0 until every sample has converged or failed.

    f: (B, D) → (B, D). z0: (B, D), floating point; a non-finite row ends as DIVERGED, at zero.
    trace: also return the history of residual norms, or of residual norms and states.
    For states of other shapes, and for gradients, see `fixed_point`.

    Raises: TypeError or ValueError for a z0 that is not a non-empty floating-point (B, D) tensor,
    and for an f that changes the shape or does not return floating-point numbers.
    """
    _check_start(z0)
    watch = Stopwatch(z0.device)
    with full_precision(f, z0.device) as guarded:
        result = _iterated(solver, guarded, z0, trace)
    return replace(result, elapsed=watch.stop())


def _iterated(
    solver: AbstractSolver, f: FlatMap, z0: Tensor, trace: TraceKind | None
) -> SolveResult:
    startable = finite(z0.sum(dim=1))
    problem = Problem(f, z0.masked_fill(~startable[:, None], 0.0), solver.pooling)
    problem.active = problem.alive = startable
    run = _Run(solver, problem)
    history = [run.snapshot(trace)] if trace else []
    memory = solver.init(problem, run.current)
    for k in range(solver.max_steps):
        # The loop's only wait for the device (methods document their own).
        if k % solver.check_every == 0 and not bool(problem.active.any()):
            break
        step, memory = solver.step(problem, run.current, memory)
        run.steps = run.steps + problem.active
        run.take(step.iterate, step.stalled)
        if trace:
            history.append(run.snapshot(trace))
    return run.result(_as_trace(history))


class _Run:
    """The bookkeeping of one solve: where every sample is, how it ended, and its best iterate."""

    def __init__(self, solver: AbstractSolver, problem: Problem) -> None:
        self.rule = solver.rule
        self.problem = problem
        self.steps = torch.zeros_like(problem.nfe)
        self.status = torch.where(problem.active, _RUNNING, int(Status.DIVERGED))
        self.current = Iterate(problem.hold, torch.zeros_like(problem.hold))
        self.best_z = problem.hold
        unknown = problem.hold.detach()[:, 0].new_full((len(problem.hold),), torch.inf)
        self.best = unknown.expand(3, -1)  # residual, ‖f(z)‖ and pooled ‖du‖ of best_z
        self.residual = unknown  # at `current`; infinite where f was never good
        self.ran_away = torch.zeros_like(problem.active)
        self.progress: Progress | None = None
        self.take(problem.evaluate(problem.hold))

    def take(self, proposed: Iterate, stuck: Tensor | None = None) -> None:
        """Test the new iterate of every active sample, freeze the finished, keep the best."""
        problem = self.problem
        with torch.no_grad():
            # Before anything is pooled: one bad sample must not spoil a norm that all share.
            good = problem.active & finite(proposed.residual)
            problem.alive = problem.alive & (good | ~problem.active)
            measures = self._measured(proposed)
            assert self.progress is not None
            good = good & ~self.progress.diverged(measures)
            self.ran_away = self.progress.ran_away(measures)
            passed = good & (measures.objective <= self.rule.threshold)
            ended = (  # of several reasons, the last one is reported
                (self.progress.stalled(measures), Status.STALLED),
                (stuck, Status.STALLED),
                (passed, Status.CONVERGED),
                (~good, Status.DIVERGED),
            )
            for here, status in ended:
                if here is not None:
                    self.status = self.status.masked_fill(problem.active & here, int(status))
            self.progress.update(measures)
        rows = good[:, None]
        self.current = Iterate(
            torch.where(rows, proposed.z, self.current.z),
            torch.where(rows, proposed.g, self.current.g),
        )
        self.residual = torch.where(good, measures.residual, self.residual)
        self._keep_best(good, passed, measures)
        problem.hold = self.current.z
        problem.alive = self.status != Status.DIVERGED
        problem.active = self.status == _RUNNING

    def _measured(self, proposed: Iterate) -> Measures:
        pooling, alive = self.problem.pooling, self.problem.alive
        if self.progress is not None:
            return self.rule.measure(proposed, pooling, alive, self.progress.bound)
        first = self.rule.measure(proposed, pooling, alive)
        eps = torch.finfo(proposed.z.dtype).eps
        self.progress = Progress(self.rule, first, pooling.length(proposed.z), eps)
        return first

    def _keep_best(self, good: Tensor, passed: Tensor, new: Measures) -> None:
        better = good & ~self.ran_away
        if self.rule.returns_best:
            # The later of two equal ones. A ratio, as in the relative tests, would not show
            # progress towards a solution at 0.
            better = better & (new.du <= self.best[2])
        better = better | passed
        self.best_z = torch.where(better[:, None], self.current.z, self.best_z)
        measured = torch.stack((new.residual, new.f_norm, new.du))
        self.best = torch.where(better, measured, self.best)

    def snapshot(self, kind: TraceKind) -> tuple[Tensor, Tensor | None]:
        """One row of the trace."""
        return self.residual, self.current.z.detach() if kind == "states" else None

    def result(self, trace: Trace | None) -> SolveResult:
        """The record of the finished solve."""
        residual, f_norm, _ = self.best
        limit = torch.where(self.ran_away, int(Status.DIVERGED), int(Status.STEP_LIMIT))
        return SolveResult(
            value=self.best_z,
            residual=residual,
            # Also infinite where f was never good.
            relative_residual=ratio(residual, f_norm).masked_fill(residual == torch.inf, torch.inf),
            steps=self.steps,
            nfe=self.problem.nfe,
            status=torch.where(self.problem.active, limit, self.status),
            trace=trace,
        )


def _check_start(z0: Tensor) -> None:
    if not isinstance(z0, Tensor):
        raise TypeError(f"z0 is a {type(z0).__name__}, but must be a tensor")
    check_floating(z0, "z0")
    if z0.ndim != 2 or z0.numel() == 0:
        raise ValueError(
            f"z0 has shape {tuple(z0.shape)}: a solver takes a non-empty (B, D) tensor; "
            "fixed_point takes any (B, ...) state"
        )


def _as_trace(history: list[tuple[Tensor, Tensor | None]]) -> Trace | None:
    if not history:
        return None
    states = [state for _, state in history if state is not None]
    return Trace(
        residuals=torch.stack([residual for residual, _ in history]),
        states=torch.stack(states) if states else None,
    )
