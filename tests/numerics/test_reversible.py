"""The Reversible adjoint: the gradient of unrolling, from reconstructed states."""

import gc
import warnings
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from fastdeq import DeepEquilibriumNetwork, fixed_point
from fastdeq.adjoints import AbstractAdjoint, Reversible, Unrolled
from fastdeq.adjoints.reversible import _Tape
from fastdeq.nn import VariationalDropout, weight_norm
from fastdeq.solution import Status
from fastdeq.solvers import Picard, ReversibleSolver
from tests.cells import DenseTanh
from tests.loops import each
from tests.numerics.gradients import cotangent, flat, gradients, relative_errors, solved
from tests.numerics.solves import run
from tests.problems import Problem, problem_named, tanh

SOLVER = ReversibleSolver(tol=1e-10, max_steps=80)


def test_the_sequences_are_those_of_the_paper():
    # y₊ = (1 − β) y + β f(z), z₊ = (1 − β) z + β f(y₊)
    problem, beta = problem_named("tanh"), 0.7
    solver = ReversibleSolver(damping=beta, tol=1e-14, max_steps=5)
    states = run(solver, problem, trace="states").trace.states
    y = z = problem.flat_z0
    for found in states:
        torch.testing.assert_close(found, z, rtol=0, atol=1e-14)  # rounding
        y = (1 - beta) * y + beta * problem.flat_f(z).detach()
        z = (1 - beta) * z + beta * problem.flat_f(y).detach()


@each("name", ["linear", "tanh", "two_scale", "nearly_singular"])
@each(
    "fields",
    [
        {},
        {"damping": 0.5, "keep_every": 10},
        {"check_every": 4},
        {"per_sample": False},
        {"max_steps": 3, "keep_every": None},  # the best iterate of samples at the step limit
    ],
)
def test_the_gradient_is_that_of_unrolling(name, fields):
    problem, solver = problem_named(name), replace(SOLVER, **fields)
    reversed_, unrolled = (gradients(problem, solver, a) for a in (Reversible(), Unrolled()))
    assert max(relative_errors(reversed_, unrolled)) <= 1e-11  # 1e-16 / (1 − β)⁵, a few times


def test_samples_that_end_at_different_steps_are_each_run_back_their_own():
    problem = tanh(batch=32)
    steps = run(SOLVER, problem).steps
    assert len(steps.unique()) > 5
    for keep in (1, 5, 7):
        solver = replace(SOLVER, keep_every=keep)
        reversed_, unrolled = (gradients(problem, solver, a) for a in (Reversible(), Unrolled()))
        assert max(relative_errors(reversed_, unrolled)) <= 1e-10


def test_a_sample_that_ends_at_its_start_and_the_start_itself_get_their_gradients():
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    z0 = torch.zeros_like(x, requires_grad=True)

    def f(z: Any) -> Any:
        return 0.9 * torch.sin(theta * z) + x

    def found(adjoint: AbstractAdjoint) -> Any:
        solver = ReversibleSolver(max_steps=4)
        value = fixed_point(f, z0, solver=solver, adjoint=adjoint).value
        assert isinstance(value, Tensor)
        return torch.autograd.grad(value.square().sum(), (theta, z0))

    for one, other in zip(found(Reversible()), found(Unrolled()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
        assert (other != 0).any()


def test_a_compacted_solve_has_the_same_gradient():
    problem = tanh(batch=16)

    def gradient(compact: float | None) -> Any:
        solution = fixed_point(
            problem.f,
            problem.flat_z0,
            solver=replace(SOLVER, compact=compact),
            adjoint=Reversible(),
            select=lambda rows: lambda z: problem.cell(z, problem.x[rows], *problem.parameters),
        )
        assert isinstance(solution.value, Tensor)
        return torch.autograd.grad(solution.value, problem.leaves, cotangent(problem))

    assert max(relative_errors(gradient(0.25), gradient(None))) <= 1e-10


def test_a_second_backward_pass_runs_the_steps_back_again():
    problem = problem_named("tanh")
    value = flat(problem, solved(problem, SOLVER, Reversible()))
    w = cotangent(problem)
    first = torch.autograd.grad(value, problem.leaves, w, retain_graph=True)
    again = torch.autograd.grad(value, problem.leaves, w)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_f_of_which_autograd_saves_nothing_is_run_back_too():
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    solver = ReversibleSolver(max_steps=9)
    value = fixed_point(
        lambda z: 0.5 * z + x, torch.zeros_like(x), solver=solver, adjoint=Reversible()
    ).value
    assert isinstance(value, Tensor)
    (grad,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 2.0), rtol=1e-2, atol=0)


# Rounding


def errors(problem: Problem, damping: float, steps: int) -> tuple[float, bool]:
    """Of the gradient, and whether a warning was given, without kept states."""
    solver = ReversibleSolver(
        damping=damping, keep_every=None, min_steps=steps, max_steps=steps, tol=1e-30
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reversed_ = gradients(problem, solver, Reversible())
    unrolled = gradients(problem, solver, Unrolled())
    return max(relative_errors(reversed_, unrolled)), bool(caught)


@each(
    "float32, damping, holds, fails",
    # Rounding of 1e-16 grows by 25 per step with β = 0.8, and by 4 with 0.5. A float32 f gives the
    # same numbers until it reaches 6e-8; then the states are lost within a few steps.
    [(True, 0.8, 9, 20), (True, 0.5, 18, 40), (False, 0.8, 5, 12), (False, 0.5, 12, 24)],
)
def test_so_many_steps_are_reconstructed_without_kept_states_and_more_give_a_warning(
    float32, damping, holds, fails
):
    problem = problem_named("nearly_singular")
    if float32:
        problem = problem.in_float32()
    error, warned = errors(problem, damping, holds)
    assert error <= 1e-6
    assert not warned
    assert errors(problem, damping, fails)[1]


def test_kept_states_hold_any_number_of_steps():
    problem = problem_named("nearly_singular")
    solver = ReversibleSolver(tol=1e-30, max_steps=100, min_steps=100)
    reversed_, unrolled = (gradients(problem, solver, a) for a in (Reversible(), Unrolled()))
    assert max(relative_errors(reversed_, unrolled)) <= 1e-11


# Memory


def saved_bytes(adjoint: AbstractAdjoint, steps: int, keep_every: int | None) -> int:
    """Of the tensors that autograd and the adjoint keep alive after the solve."""
    width, total = 256, 0
    weight = torch.randn(width, width, requires_grad=True)
    x = torch.randn(4, width)

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes if tensor.data_ptr() != weight.data_ptr() else 0
        return tensor

    solver = ReversibleSolver(
        tol=1e-30, max_steps=steps, min_steps=steps, damping=0.5, keep_every=keep_every
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fixed_point(
            lambda z: torch.tanh(0.5 * z @ weight / width**0.5 + x),
            torch.zeros(4, width),
            solver=solver,
            adjoint=adjoint,
        )
    return total


def test_autograd_keeps_no_states_of_the_steps():
    # A mask of the batch may be kept per step; a state has 4 kB.
    assert saved_bytes(Reversible(), 40, None) - saved_bytes(Reversible(), 10, None) <= 30 * 64
    assert saved_bytes(Unrolled(), 40, None) - saved_bytes(Unrolled(), 10, None) >= 30 * 4096


def test_a_solve_is_freed_with_its_graph_without_the_garbage_collector(monkeypatch):
    tapes: list[weakref.ref[_Tape]] = []
    made = _Tape.__init__

    def watched(self: _Tape, *arguments: Any) -> None:
        made(self, *arguments)
        tapes.append(weakref.ref(self))

    monkeypatch.setattr(_Tape, "__init__", watched)
    problem = problem_named("tanh")
    gradients(problem, SOLVER, Reversible())  # the first import of torch._dynamo keeps its frames
    gc.collect()
    gc.disable()
    try:
        gradients(problem, SOLVER, Reversible())
        solved(problem, SOLVER, Reversible())  # without a backward pass
        assert [tape() for tape in tapes] == [None] * 3
    finally:
        gc.enable()


# In layers


@each("extra", [None, VariationalDropout(0.5)])
@each("normalized", [False, True])
def test_masks_and_normalized_weights_of_a_call_are_used_again_in_its_backward_pass(
    extra, normalized
):
    def found(adjoint: AbstractAdjoint) -> list[Tensor]:
        torch.manual_seed(1)
        cell: nn.Module = DenseTanh(6, 0.4, extra)
        if normalized:
            weight_norm(cell)
        layer = DeepEquilibriumNetwork(cell, solver=ReversibleSolver(max_steps=8), adjoint=adjoint)
        stem = nn.Linear(6, 6, dtype=torch.float64)
        layer(stem(torch.randn(5, 6, dtype=torch.float64)))[0].square().sum().backward()
        return [p.grad for m in (stem, layer) for p in m.parameters() if p.grad is not None]

    torch.testing.assert_close(found(Reversible()), found(Unrolled()), rtol=1e-10, atol=1e-12)


def test_autocast_is_that_of_the_forward_pass():
    def found(adjoint: AbstractAdjoint) -> Tensor:
        weight = torch.linspace(-0.1, 0.1, 64).view(8, 8).requires_grad_()
        x = torch.linspace(-1, 1, 24).view(3, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solution = fixed_point(
                lambda z: torch.tanh(z @ weight + x),
                torch.zeros(3, 8),
                solver=ReversibleSolver(max_steps=6),
                adjoint=adjoint,
            )
        assert isinstance(solution.value, Tensor)
        return torch.autograd.grad(solution.value.square().sum(), weight)[0]

    torch.testing.assert_close(found(Reversible()), found(Unrolled()), rtol=1e-5, atol=1e-6)


# When something is wrong


def test_another_solver_and_a_damping_of_one_are_refused_with_the_cure():
    problem = problem_named("tanh")
    with pytest.raises(ValueError, match="cannot run Picard backwards: use the ReversibleSolver"):
        solved(problem, Picard(), Reversible())
    with pytest.raises(ValueError, match="damping=1 backwards: use a damping below 1"):
        solved(problem, ReversibleSolver(damping=1.0), Reversible())


def test_a_second_derivative_and_forward_mode_are_refused_with_the_cure():
    problem = problem_named("tanh")
    value = flat(problem, solved(problem, SOLVER, Reversible()))
    grads = torch.autograd.grad(value.square().sum(), problem.leaves, create_graph=True)
    for first in grads:
        for leaf in problem.leaves:
            with pytest.raises(RuntimeError, match=r"once, not twice: use Implicit\(order=2\)"):
                torch.autograd.grad(first.square().sum(), leaf, retain_graph=True)

    def of_x(x: Tensor) -> Tensor:
        bound = problem.bound(x, *problem.parameters)
        return flat(bound, solved(bound, SOLVER, Reversible()))

    x = problem.x.detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="use the Unrolled adjoint, or reverse mode"):
            of_x(dual)
    with pytest.raises(RuntimeError, match=r"within transforms of torch\.func: use the Unrolled"):
        torch.func.jvp(of_x, (x,), (torch.ones_like(x),))


def test_a_sample_that_diverges_does_not_disturb_the_gradients_of_the_others():
    a = torch.tensor([[0.5], [4.0], [0.3]], dtype=torch.float64, requires_grad=True)

    def f(z: Any) -> Any:
        return a * z.square() * 0.5 + a  # sample 1 has no equilibrium and soon overflows

    z0 = torch.zeros(3, 2, dtype=torch.float64)
    found = []
    for adjoint in (Reversible(), Unrolled()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of Unrolled: a sample diverged
            solution = fixed_point(f, z0, solver=replace(SOLVER, max_steps=60), adjoint=adjoint)
            assert solution.status.tolist() == [0, int(Status.DIVERGED), 0]
            assert isinstance(solution.value, Tensor)
            found.append(torch.autograd.grad(solution.value.sum(), a)[0])
    assert torch.isfinite(found[0]).all()
    torch.testing.assert_close(found[0][[0, 2]], found[1][[0, 2]], rtol=1e-10, atol=0)
