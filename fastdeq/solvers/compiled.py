"""Solves in compiled chunks: `check_every` steps of a method, with f and all tests, as one graph.

A chunk is `_advance` below, which runs the same `step` and the same `Progress.test` as the eager
loop. Within it nothing is decided on the host: every selection is a `where`, histories have their
full size from the start, and the host looks once after each chunk. `torch.compile` guards on the
settings of the solver, on the code of f, and on shapes, dtypes and modes of its modules; weights
and inputs are arguments of the graph, so that it stays valid when they change.
"""

import sys
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdeq.autodiff import carries_tangent
from fastdeq.compilation import run_compiled
from fastdeq.notation import FlatMap
from fastdeq.rows import traceable
from fastdeq.solvers.base import AbstractSolver, Problem
from fastdeq.solvers.termination import STALL_WINDOW, Iterate, Progress


class Carry(NamedTuple):
    """What one chunk hands to the next. z, g, best_z: (B, D). steps, nfe: (B,) int64. limit: the
    `max_steps` of the solver, so that another value is not another graph. progress: of
    `Progress.tensors`."""

    z: Tensor
    g: Tensor
    best_z: Tensor
    steps: Tensor
    nfe: Tensor
    limit: Tensor
    progress: dict[str, Tensor]


def iterate(solver: AbstractSolver, f: FlatMap, carry: Carry) -> Carry:
    """Run compiled chunks until every sample has ended; returns the last carry."""
    memory = solver.init(_problem(solver, f, carry), Iterate(carry.z, carry.g))
    # Arguments that share memory would be another graph than those of later chunks.
    carry, solver = _separate(carry), _without_limits(solver)
    while bool(carry.progress["active"].any()):
        carry, memory = run_compiled(_advance, solver, carry.z.device, solver, f, carry, memory)
    return carry


def map_of(f: FlatMap) -> FlatMap:
    """f, compiled alone; evaluated as it is for tensors with tangents, which are not compiled."""

    def call(z: Tensor) -> Tensor:
        if carries_tangent(z):
            return f(z)
        output: Tensor = run_compiled(_evaluate, None, z.device, f, z)
        return output

    return call


def _evaluate(f: FlatMap, z: Tensor) -> Tensor:
    return traceable(f)(z)


def stalls(solver: AbstractSolver) -> bool:
    """Whether a solve has enough steps for a test for stalls."""
    return solver.max_steps + 1 >= STALL_WINDOW


def _problem(solver: AbstractSolver, f: FlatMap, carry: Carry) -> Problem:
    # A norm that the batch shares says that f may couple the samples.
    guarded = solver.pooling.shared
    return Problem(f, carry.z, solver.pooling, guarded=guarded, fixed_shapes=True)


def _advance(solver: AbstractSolver, f: FlatMap, carry: Carry, memory: Any) -> tuple[Carry, Any]:
    """`check_every` steps of all samples that have not ended; those after `max_steps` change
    nothing."""
    problem = _problem(solver, traceable(f), carry)
    progress = Progress.restored(solver.rule, solver.pooling, carry.z, carry.progress)
    at, best_z, steps, nfe = Iterate(carry.z, carry.g), carry.best_z, carry.steps, carry.nfe
    for _ in range(solver.check_every):
        active, ran_away = progress.active, progress.ran_away
        at, best_z, memory, evaluations = stepped(solver, problem, progress, at, best_z, memory)
        steps, nfe = steps + active, nfe + active * evaluations
        assert ran_away is not None
        assert progress.ran_away is not None
        progress.ran_away = torch.where(active, progress.ran_away, ran_away)
        progress.active = progress.active & (steps < carry.limit)
    return Carry(at.z, at.g, best_z, steps, nfe, carry.limit, progress.tensors()), memory


def stepped(
    solver: AbstractSolver,
    problem: Problem,
    progress: Progress,
    at: Iterate,
    best_z: Tensor,
    memory: Any,
) -> tuple[Iterate, Tensor, Any, int | Tensor]:
    """One step of all samples that have not ended, and its test, without a decision on the host.

    Returns the iterate, the best states, the memory, and the evaluations of f.
    """
    problem.freeze(best_z, progress.active, progress.alive)
    step, memory = solver.step(problem, at, memory)
    new = step.iterate
    better = progress.test(new, progress.rule.measure(new), step.stalled)
    assert better is not None  # on the host alone
    best_z = torch.where(better[:, None], new.z, best_z)
    rows = progress.active[:, None]
    at = Iterate(torch.where(rows, new.z, best_z), new.g.masked_fill(~rows, 0.0))
    return at, best_z, memory, problem.take_count()


def _separate(carry: Carry) -> Carry:
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() in seen:
            return tensor.clone()
        seen.add(tensor.data_ptr())
        return tensor

    progress = {name: own(tensor) for name, tensor in carry.progress.items()}
    z, g, best_z, steps, nfe, limit = (own(tensor) for tensor in carry[:-1])
    return Carry(z, g, best_z, steps, nfe, limit, progress)


@cache
def _without_limits(solver: AbstractSolver) -> AbstractSolver:
    return replace(solver, max_steps=sys.maxsize, min_steps=None)
