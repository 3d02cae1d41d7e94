"""States on the way to the equilibrium: which they are, their gradients, and what is refused."""

from typing import Any

import pytest
import torch

from fastdeq import GMRES, fixed_point
from fastdeq.adjoints import Implicit, JacobianFree, Phantom, Unrolled
from fastdeq.flatten import scales_of
from fastdeq.solvers import Anderson, LimitedMemoryBroydenSolver, Picard
from tests.loops import each
from tests.problems import SOLVERS, problem_named

STEPS = [1, 3, 6]
A = torch.tensor(0.4, dtype=torch.float64)


def solved(*given: Any, **options: Any) -> Any:
    return fixed_point(*given, **options)


def scalar(a):
    return lambda z: torch.tanh(a * z + 0.5)


def start():
    return torch.zeros(2, 1, dtype=torch.float64)


@each("name", sorted(SOLVERS))
def test_a_state_is_f_at_the_iterate_of_that_step_with_every_solver(name):
    problem = problem_named("tanh")
    solver = SOLVERS[name](tol=1e-10, max_steps=60)
    solution = solved(problem.f, problem.z0, solver=solver, trace="states", states=STEPS)
    for step, state in zip(STEPS, solution.states, strict=True):
        iterates = solution.trace.states
        at = iterates[min(step, len(iterates) - 1)]
        torch.testing.assert_close(state, problem.f(at), rtol=0, atol=0)


def test_states_change_neither_the_equilibrium_nor_its_gradient_nor_the_counts():
    problem = problem_named("tanh")
    one = solved(problem.f, problem.z0)
    two = solved(problem.f, problem.z0, states=3)
    for each_one, other in ((one.value, two.value), (one.nfe, two.nfe), (one.steps, two.steps)):
        assert torch.equal(each_one, other)
    got, expected = (torch.autograd.grad(s.value.sum(), problem.leaves) for s in (two, one))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@each("n, steps", [(1, [20]), (3, [10, 20, 30]), (39, list(range(1, 40)))])
def test_a_number_of_states_is_spaced_evenly_up_to_max_steps(n, steps):
    problem = problem_named("tanh")
    solver = Picard(tol=1e-14, max_steps=40)
    several, listed = (
        solved(problem.f, problem.z0, solver=solver, states=states).states for states in (n, steps)
    )
    assert len(several) == n
    assert all(torch.equal(a, b) for a, b in zip(several, listed, strict=True))


def test_a_sample_that_has_ended_keeps_its_last_state():
    def f(z):
        return torch.tensor([[0.0], [0.9]]) * z + 1  # the first ends after one step

    solver = Picard(tol=1e-6, max_steps=300)
    early, late = solved(f, torch.zeros(2, 1), solver=solver, states=[1, 200]).states
    assert early[0] == late[0] == 1
    assert early[1] < late[1]
    assert late[1] == pytest.approx(10, rel=1e-4)


def test_the_states_of_a_state_of_several_scales_are_tuples_of_them():
    problem = problem_named("two_scale")
    solution = solved(problem.f, problem.z0, states=2)
    for state in solution.states:
        assert [each.shape for each in state] == [each.shape for each in scales_of(problem.z0)]


def test_every_state_has_the_gradient_of_its_own_adjoint():
    """Of z = tanh(a z + 0.5) at the iterate z_k of Picard: s = 1 − tanh², v = w / (1 − a s)."""
    a = A.clone().requires_grad_()
    z1 = torch.tanh(torch.tensor(0.5, dtype=torch.float64))  # after one step from 0
    slope = 1 - torch.tanh(A * z1 + 0.5) ** 2
    expected = {  # z1 itself does not depend on a: its step starts at z = 0
        Implicit(solver=GMRES(tol=1e-14)): slope * z1 / (1 - A * slope),
        JacobianFree(): slope * z1,
        Unrolled(): slope * z1,
    }
    for adjoint, value in expected.items():
        solver = Picard(tol=1e-12)
        (state,) = solved(scalar(a), start(), solver=solver, adjoint=adjoint, states=[1]).states
        (got,) = torch.autograd.grad(state[0, 0], a)
        torch.testing.assert_close(got, value, rtol=1e-12, atol=0)


def test_unrolled_states_have_the_gradient_of_their_steps():
    a = A.clone().requires_grad_()
    solution = solved(scalar(a), start(), solver=Picard(tol=1e-12), adjoint=Unrolled(), states=[3])
    z = start()
    for _ in range(4):  # three steps and the closing evaluation
        z = scalar(a)(z)
    (got,), (expected,) = (torch.autograd.grad(s.sum(), a) for s in (solution.states[0], z))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_another_adjoint_of_the_states_leaves_the_equilibriums_alone():
    a = A.clone().requires_grad_()
    for adjoint in (Implicit(), Unrolled()):
        both = solved(scalar(a), start(), adjoint=adjoint, states=2, states_adjoint=Phantom())
        same = solved(scalar(a), start(), adjoint=Phantom(), states=2)
        plain = solved(scalar(a), start(), adjoint=adjoint)
        pairs = [*zip(both.states, same.states, strict=True), (both.value, plain.value)]
        for one, other in pairs:
            (got,), (expected,) = (torch.autograd.grad(s.sum(), a) for s in (one, other))
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


def test_states_without_gradients_are_values():
    with torch.no_grad():
        solution = solved(scalar(A), start(), solver=Anderson(), states=[1, 2])
    assert not any(state.requires_grad for state in solution.states)
    torch.testing.assert_close(solution.states[0], scalar(A)(scalar(A)(start())))


def test_a_state_where_f_is_not_finite_is_the_state_itself():
    with pytest.warns(RuntimeWarning, match="not finite"):
        solution = solved(lambda z: z * torch.nan, torch.ones(2, 1), states=[1, 2])
    assert all(torch.equal(state, torch.ones(2, 1)) for state in solution.states)


def never(z):
    raise AssertionError("f is evaluated")


@each(
    "states, error, message",
    [
        ([3, 11], ValueError, r"states is \[3, 11\].*at most max_steps=10 steps: raise"),
        (10, ValueError, "states is 10, but the solver takes at most max_steps=10"),
        (0, ValueError, "1 or more"),
        ([0, 2], ValueError, "1 or more"),
        ([3, 2], ValueError, "ascending"),
        ([2, 2], ValueError, "ascending"),
        ("12", TypeError, "must be a number of states"),
        (1.5, TypeError, "must be a number of states"),
        ([True], TypeError, "must be a number of states"),
    ],
)
def test_states_that_no_step_has_are_refused_before_any_work(states, error, message):
    solver = LimitedMemoryBroydenSolver(max_steps=10)
    with pytest.raises(error, match=message):
        solved(never, torch.zeros(1, 1), solver=solver, states=states)


@each(
    "adjoint, error, message",
    [
        (Phantom, TypeError, "must be an adjoint"),
        (Unrolled(), ValueError, "states_adjoint is Unrolled.*Phantom"),
    ],
)
def test_an_adjoint_that_cannot_close_states_is_refused(adjoint, error, message):
    with pytest.raises(error, match=message):
        solved(never, torch.zeros(1, 1), states=2, states_adjoint=adjoint)
