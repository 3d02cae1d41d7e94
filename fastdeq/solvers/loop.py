"""The loop of all solvers: it counts, tests, freezes and keeps the best iterate; methods only step.

A step computes an iterate and its norms. It decides nothing, so it needs no masks, and several
steps can run before the host looks. Every `check_every` steps the norms are read, and the host goes
through these steps one by one: which samples ended, and which iterate is the best.

Departures from a plain `while residual > tol`:
1. Every sample ends on its own and its state is frozen from then on, so a batch gives the results
   of its samples alone.
2. A sample that becomes non-finite, grows past the protective factor, or runs away while its
   residual does not fall (see `termination.py`) is set back to its last good iterate and marked;
   the others are not affected.
3. Steps that a sample makes after its end, before the host looks, are neither used nor counted.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fastdeq.autocast import full_precision
from fastdeq.autodiff import is_recorded
from fastdeq.flatten import check_floating
from fastdeq.notation import FlatMap
from fastdeq.rows import BatchMap, Compaction
from fastdeq.solution import Recording, SolveResult, Trace, TraceKind
from fastdeq.solvers import compiled
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.compiled import Carry
from fastdeq.solvers.termination import Iterate, Measures, Progress, ratio
from fastdeq.timer import Stopwatch
from fastdeq.transforms import transformed


def solve(
    solver: AbstractSolver,
    f: FlatMap,
    z0: Tensor,
    *,
    trace: TraceKind | None = None,
    states: Collection[int] = (),
) -> SolveResult:
    """Iterate `solver` on f from z0 until every sample has converged or failed.

    f: (B, D) → (B, D). z0: (B, D), floating point; a non-finite row ends as DIVERGED, at zero.
    trace: also return the history of residual norms, or of residual norms and states.
    states: steps (from 1) after which the state is returned, too; only these states are kept.
    With `solver.compact`, f is a `BatchMap`.
    For states of other shapes, and for gradients, see `fixed_point`.

    Raises: TypeError or ValueError for a z0 that is not a non-empty floating-point (B, D) tensor,
    for an f that changes the shape or does not return floating-point numbers, and for
    `solver.compact` with an f that cannot be restricted.
    """
    return solve_with_memory(solver, f, z0, Recording(trace, tuple(states)))[0]


def solve_with_memory(
    solver: AbstractSolver, f: FlatMap, z0: Tensor, record: Recording
) -> tuple[SolveResult, Any]:
    """The same, and the method's memory after its last step (see `AbstractSolver.init`)."""
    _check_start(z0)
    if solver.compact and not isinstance(f, BatchMap):
        raise ValueError(
            "solver.compact evaluates f for some of the samples: give fixed_point a `select` that "
            "restricts f to these, or leave compact out"
        )
    watch = Stopwatch(z0.device)
    with full_precision(f, z0.device) as guarded:
        result, memory = _iterated(solver, guarded, z0, record)
    return replace(result, elapsed=watch.stop()), memory


def _iterated(
    solver: AbstractSolver, f: FlatMap, z0: Tensor, record: Recording
) -> tuple[SolveResult, Any]:
    compiles = solver.compile and record == Recording() and not _is_differentiated(z0)
    if compiles and not solver.compiles_steps:
        f = compiled.map_of(f)
    run = _Run(solver, f, z0, record)
    if compiles and solver.compiles_steps and run.unfinished:
        run.adopt(compiled.iterate(solver, f, run.carry(solver)))
        return run.result(), None
    memory = solver.init(run.problem, run.current)
    left = solver.max_steps
    while left and run.unfinished:
        steps, at = [], run.current
        for _ in range(min(solver.check_every, left)):
            step, memory = solver.step(run.problem, at, memory)
            at = step.iterate
            steps.append((step, run.problem.take_count()))
        left -= len(steps)
        run.take(steps)
    return run.result(), memory


class _Run:
    """The state of one solve: the progress of every sample, its counts, and its best iterate."""

    def __init__(self, solver: AbstractSolver, f: FlatMap, z0: Tensor, record: Recording) -> None:
        lost = _not_finite(z0.detach())
        if lost is not None:
            z0 = z0.masked_fill(lost, 0.0)
        self.rule, self.record = solver.rule, record
        self.problem = Problem(f, z0, solver.pooling, guarded=solver.guarded)
        self.progress = Progress(solver.rule, solver.pooling, z0, solver.min_steps or 0)
        # A shared norm says that f may couple the samples.
        self._may_spread = solver.pooling.shared and not solver.guarded
        self._compaction = Compaction(f, solver.compact, len(z0))
        self.best_z = z0
        # The counts of the samples in `_counted`, (B,), since it last changed.
        self._counted, self._taken = self.progress.active, -1
        self._evaluated: int | Tensor = 0
        self.steps = self.nfe = torch.zeros_like(self.progress.status)
        # For the record: residual and state of the last good iterate, and what is kept of them.
        self.last = self.progress.residual, z0
        self.history: list[tuple[Tensor, Tensor | None]] = []
        self.states: dict[int, Tensor] = {}
        self._number = -1  # of the step recorded last; 0 is the start
        self.unfinished = True
        first = self.problem.evaluate(z0)
        self.current = first
        if lost is not None:
            self.current = Iterate(z0, first.g.masked_fill(lost, torch.nan))
        self.take([(Step(self.current), self.problem.take_count())])

    def take(self, steps: Sequence[tuple[Step, int | Tensor]]) -> None:
        """Test the iterates of some steps, in their order, and freeze the samples that ended.

        steps: with the evaluations of f that each took, one number for all samples or (B,).
        The loop's only wait for the device (methods document their own).
        """
        progress, before = self.progress, self.progress.active
        read = self._read(steps)
        if self._may_spread and not math.isfinite(float(read[0][0].residual.sum())):
            steps = [(self._again(step), count) for step, count in steps]
            read = self._read(steps)
        for (step, _), (measures, stuck, count) in zip(steps, read, strict=True):
            self._taken += 1  # the first evaluation is not a step
            self._evaluated = self._evaluated + count
            self._keep(step.iterate, progress.test(step.iterate, measures, stuck))
            if self.record.trace or self.record.steps:
                self._record(step.iterate, measures.residual)
            if progress.active is not self._counted:
                self._count()
                if not bool(progress.active.any()):
                    self.unfinished = False
                    return
        at = steps[-1][0].iterate
        self.problem.hold = self.best_z
        if progress.active is not before:
            at = self._frozen(at)
        self.current = at

    def carry(self, solver: AbstractSolver) -> Carry:
        """What compiled steps continue from, after the first evaluation."""
        self._count()
        device, at = self.best_z.device, self.current
        kept = self.progress.tensors(stalls=compiled.stalls(solver))
        return Carry(
            at.z,
            at.g,
            self.best_z,
            self.steps.to(device),
            self.nfe.to(device),
            torch.tensor(solver.max_steps, device=device),
            {name: tensor.to(device) for name, tensor in kept.items()},
        )

    def adopt(self, carry: Carry) -> None:
        """Continue after compiled steps."""
        self.progress = Progress.restored(self.rule, self.problem.pooling, carry.z, carry.progress)
        self._counted, self._taken, self._evaluated = self.progress.active, 0, 0
        self.steps, self.nfe, self.best_z = carry.steps, carry.nfe, carry.best_z

    def _count(self) -> None:
        """Bring the counts of every sample up to date."""
        self.steps = self.steps + self._counted * self._taken
        self.nfe = self.nfe + self._counted * self._evaluated
        self._counted, self._taken, self._evaluated = self.progress.active, 0, 0

    def _read(
        self, steps: Sequence[tuple[Step, int | Tensor]]
    ) -> list[tuple[Measures, Tensor | None, int | Tensor]]:
        """The norms of the iterates, who is stuck, and the evaluations, on the host."""
        read = []
        for step, count in steps:
            m = self.rule.measure(step.iterate)
            read += [m.residual, m.f_norm, m.du, m.size, step.stalled, count]
        values = on_host(read)
        return [
            (Measures(*values[i : i + 4]), values[i + 4], values[i + 5])
            for i in range(0, len(values), 6)
        ]

    def _again(self, step: Step) -> Step:
        """The step without the states that are not finite, whose effect on others f may have
        spread. This second evaluation is not counted."""
        at = self.problem.evaluate(step.iterate.z, guarded=True)
        self.problem.take_count()
        return step._replace(iterate=at)

    def _keep(self, at: Iterate, better: Tensor | None) -> None:
        """Make `at` the best iterate of the samples in `better`, (B,); None: of all."""
        if better is None:
            self.best_z = at.z
        elif bool(better.any()):
            rows = better.to(at.z.device)[:, None]
            self.best_z = torch.where(rows, at.z, self.best_z)

    def _record(self, at: Iterate, residual: Tensor) -> None:
        good, (last, z) = self.progress.good, self.last
        rows = good.to(z.device)[:, None]
        last, z = self.last = torch.where(good, residual, last), torch.where(rows, at.z, z)
        self._number += 1
        if self._number in self.record.steps:
            self.states[self._number] = z
        if self.record.trace:
            self.history.append((last, z.detach() if self.record.trace == "states" else None))

    def _frozen(self, at: Iterate) -> Iterate:
        """Freeze the samples that have ended; returns `at` with their frozen states."""
        device = at.z.device
        active, alive = self.progress.active.to(device), self.progress.alive.to(device)
        self.problem.freeze(self.best_z, active, alive)
        restrict = self._compaction.due(int(self.progress.active.sum()))
        if restrict is not None:
            self.problem.narrow(restrict)
        rows = active[:, None]
        return Iterate(torch.where(rows, at.z, self.best_z), at.g.masked_fill(~rows, 0.0))

    def result(self) -> SolveResult:
        """The record of the finished solve."""
        self._count()
        progress, device = self.progress, self.best_z.device
        unknown = progress.residual == torch.inf  # f was never good
        relative = ratio(progress.residual, progress.f_norm).masked_fill(unknown, torch.inf)
        return SolveResult(
            value=self.best_z,
            residual=progress.residual.to(device),
            relative_residual=relative.to(device),
            steps=self.steps.to(device),
            nfe=self.nfe.to(device),
            status=progress.ended().to(device),
            trace=self._traced(),
            states=tuple(self.states.get(step, self.last[1]) for step in self.record.steps),
        )

    def _traced(self) -> Trace | None:
        if not self.record.trace:
            return None
        states = [z for _, z in self.history if z is not None]
        return Trace(
            residuals=torch.stack([last for last, _ in self.history]).to(self.best_z.device),
            states=torch.stack(states) if states else None,
        )


def _is_differentiated(z0: Tensor) -> bool:
    """Whether derivatives may be recorded here, in any mode."""
    return is_recorded(z0) or forward_ad._current_level >= 0 or transformed()


def on_host(values: Sequence[Any]) -> list[Any]:
    """The values with their tensors, each (B,), on the CPU: one copy for all of them."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or tensors[0].device.type == "cpu":
        return list(values)
    wide = torch.stack([tensor.to(torch.float64) for tensor in tensors])
    read = iter(wide.cpu())
    return [next(read).to(value.dtype) if isinstance(value, Tensor) else value for value in values]


def _not_finite(z0: Tensor) -> Tensor | None:
    """Which samples have a start that is not finite, (B, 1); None: no sample. Waits for the device,
    as the first read after it does."""
    if math.isfinite(float(z0.sum())):  # a sum is finite only if every entry is
        return None
    return ~torch.isfinite(z0).all(dim=1, keepdim=True)


def _check_start(z0: Tensor) -> None:
    if not isinstance(z0, Tensor):
        raise TypeError(f"z0 is a {type(z0).__name__}, but must be a tensor")
    check_floating(z0, "z0")
    if z0.ndim != 2 or z0.numel() == 0:
        raise ValueError(
            f"z0 has shape {tuple(z0.shape)}: a solver takes a non-empty (B, D) tensor; "
            "fixed_point takes any (B, ...) state"
        )
