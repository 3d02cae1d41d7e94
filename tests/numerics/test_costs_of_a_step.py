"""What a training step costs in evaluations of f, VJPs and new memory: counts, which hold on every
machine."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdeq import GMRES, fixed_point
from fastdeq.adjoints import AbstractAdjoint, Implicit, JacobianFree, Phantom, Unrolled
from fastdeq.bench.operations import Operations, OutOfTime, Watch
from fastdeq.solvers import (
    AbstractSolver,
    Anderson,
    BroydenSolver,
    ContinuousSolver,
    LimitedMemoryBroydenSolver,
    NewtonKrylov,
    Picard,
    solve,
)
from tests.loops import each

BATCH, SIZE, STEPS = 3, 400, 6
STATE = BATCH * SIZE * 4  # bytes
NEVER = 1e-30  # a tolerance that no solve meets
X = torch.randn(BATCH, SIZE, generator=torch.Generator().manual_seed(1))
SLOPE = torch.linspace(-0.95, 0.95, SIZE)

Make = Callable[..., AbstractSolver]

# Evaluations of the solve itself: the first one, and those of each step.
SOLVERS: dict[str, tuple[Make, int]] = {
    "picard": (Picard, 1 + STEPS),
    "anderson": (Anderson, 1 + STEPS),
    "lbroyden": (LimitedMemoryBroydenSolver, 1 + STEPS),
    "broyden": (partial(BroydenSolver, line_search_steps=0), 1 + STEPS),
    # A cycle of GMRES takes 3 products, and one more to measure its residual.
    "newton_krylov": (
        partial(NewtonKrylov, line_search_steps=0, krylov_steps=3, krylov_tol=1e-12),
        1 + STEPS * (1 + 3 + 1),
    ),
    "tsit5": (partial(ContinuousSolver, method="tsit5"), 1 + STEPS * 6),
    "bs3": (partial(ContinuousSolver, method="bs3"), 1 + STEPS * 3),
    "vcab3": (partial(ContinuousSolver, method="vcab3"), 1 + STEPS),
}

# VJPs: those of the backward solve, and one through the closing evaluation.
ADJOINTS: dict[str, tuple[AbstractAdjoint, int]] = {
    "gmres": (Implicit(solver=GMRES(tol=1e-12, max_steps=STEPS)), STEPS + 1 + 1),
    # The recurrence of a whole batch is exact: its residual is not measured.
    "gmres_whole_batch": (
        Implicit(solver=GMRES(tol=1e-4, max_steps=STEPS, per_sample=False)),
        STEPS + 1,
    ),
    "picard": (Implicit(solver=Picard(tol=NEVER, max_steps=STEPS)), 1 + STEPS + 1),
    "anderson": (Implicit(solver=Anderson(tol=NEVER, max_steps=STEPS)), 1 + STEPS + 1),
    "jfb": (JacobianFree(), 1),
    "phantom": (Phantom(steps=5), 5),
}


class _Counted(torch.autograd.Function):
    """The identity; counts its backward passes."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Tensor:
        _Counted.passes += 1
        return w


def counted(solver: AbstractSolver, adjoint: AbstractAdjoint) -> tuple[int, int, int, int]:
    """Evaluations of the forward pass, those that are reported, those of the backward pass, and
    VJPs."""
    x, calls, _Counted.passes = X.clone().requires_grad_(), 0, 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        output: Tensor = _Counted.apply(torch.tanh(SLOPE * z + x))
        return output

    found = fixed_point(f, torch.zeros(BATCH, SIZE), solver=solver, adjoint=adjoint)
    forward = calls
    assert isinstance(found.value, Tensor)
    found.value.square().sum().backward()
    return forward, int(found.nfe.max()), calls - forward, _Counted.passes


@each("solver", SOLVERS)
@each("adjoint", ADJOINTS)
def test_a_step_evaluates_f_and_its_vjp_as_often_as_its_methods_need(solver, adjoint):
    (make, evaluations), (settings, vjps) = SOLVERS[solver], ADJOINTS[adjoint]
    more = settings.steps - 1 if isinstance(settings, Phantom) else 0
    forward, nfe, backward, passes = counted(make(tol=NEVER, max_steps=STEPS), settings)
    assert nfe == evaluations + 1  # the closing one, for the graph
    assert forward == nfe + more
    assert (backward, passes) == (0, vjps)


@each("solver", set(SOLVERS) - {"newton_krylov"})
def test_the_unrolled_adjoint_adds_no_evaluations_and_visits_each_at_most_once(solver):
    forward, nfe, backward, passes = counted(
        SOLVERS[solver][0](tol=NEVER, max_steps=STEPS), Unrolled()
    )
    assert forward == nfe
    assert backward == 0
    assert passes <= nfe


# Memory


def new_memory(solver: AbstractSolver | GMRES) -> float:
    """Of the tensors that a step makes, in states: of the eleventh, when no history grows."""
    found = []
    for steps in (10, 11):
        settings = type(solver)(**{**vars(solver), "max_steps": steps})
        operations = Operations()
        with operations, torch.no_grad():
            if isinstance(settings, GMRES):
                settings.solve(lambda v: v - SLOPE * v, X)
            else:
                solve(settings, lambda z: torch.tanh(SLOPE * z + X), torch.zeros(BATCH, SIZE))
        found.append(operations.allocated)
    return (found[1] - found[0]) / STATE


@each(
    "make, most",
    [
        (Picard, 6.1),
        (Anderson, 9.2),
        (LimitedMemoryBroydenSolver, 8.3),
        (partial(BroydenSolver, line_search_steps=0), 17.2),
        (GMRES, 5.4),
    ],
)
@each("per_sample", [True, False])
def test_a_step_makes_at_most_so_many_new_states(make, most, per_sample):
    # As measured with torch 2.13. Three are the cell's (of GMRES two).
    assert new_memory(make(tol=NEVER, per_sample=per_sample)) <= most


# The counting itself


def test_the_watch_sees_the_peak_of_memory_and_not_the_sum():
    with Watch(limit=60) as watch:
        x = torch.zeros(1000)
        for _ in range(5):
            x = x + 1  # two at once
        x[:10].view(2, 5).add_(1)  # no new memory
        kept = [x, x.clone(), x.clone()]
    assert watch.peak == 4000 * len(kept)


def test_the_watch_ends_what_takes_too_long():
    watch = Watch(limit=-1)
    with pytest.raises(OutOfTime), watch:
        torch.zeros(3)
