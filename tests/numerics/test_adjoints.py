"""Exact adjoints equal the dense formula; approximate ones are descent directions.

One suite for every solver × every exact adjoint × every problem: a new adjoint, or a new solver for
the backward pass, joins as one row of `BACKWARD` in `gradients.py`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdeq import GMRES, fixed_point
from fastdeq.adjoints import (
    AbstractAdjoint,
    Direct,
    Implicit,
    JacobianFree,
    Neumann,
    Phantom,
    Shine,
    Unrolled,
)
from fastdeq.solution import Status
from fastdeq.solvers import LimitedMemoryBroydenSolver, Picard
from tests.loops import each
from tests.numerics.gradients import (
    BACKWARD,
    EXACT,
    FORWARD,
    cotangent,
    flat,
    gradients,
    relative_errors,
    solved,
)
from tests.problems import HOPELESS, SOLVERS, problem_named

# Relative, of every leaf. It follows from the residual tolerance times the amplification of
# `nearly_singular` (50), and for Unrolled from the convergence of the derivative, which is behind
# that of the state by a factor that grows with the steps.
BOUND = 1e-8
PROBLEMS = ("linear", "tanh", "two_scale", "nearly_singular", "non_contractive")
# At rates of 0.992 and 0.994 per step these would need 4000 to 6000 steps.
SLOW = {("picard_damped", "nearly_singular"), ("vcab3", "nearly_singular")}

worst: dict[tuple[str, str, str], float] = {}


def combinations() -> list[tuple[str, str, str]]:
    """(problem, forward solver, adjoint): every solver with GMRES and unrolled, and every backward
    solver after one forward solver."""
    both = [(f, b) for f in FORWARD for b in ("gmres", "unrolled")]
    both += [("lbroyden", b) for b in FORWARD]
    both += [("reversible", "backwards")]
    return [
        (problem, forward, backward)
        for problem in PROBLEMS
        for forward, backward in both
        if not {(forward, problem), (backward, problem)} & (HOPELESS | SLOW)
        and (forward, backward) != ("newton_krylov", "unrolled")
    ]


# Exact adjoints


@pytest.mark.parametrize(("problem_name", "forward", "backward"), combinations())
def test_an_exact_adjoint_equals_the_dense_formula(problem_name, forward, backward):
    problem = problem_named(problem_name)
    got = gradients(problem, FORWARD[forward], EXACT[backward])
    error = max(relative_errors(got, problem.gradient(cotangent(problem))))
    worst[problem_name, forward, backward] = error
    assert error <= BOUND


def test_the_worst_gradient_error_of_all_combinations_is_within_the_bound(record_property):
    if len(worst) < len(combinations()):
        pytest.skip("needs all of test_an_exact_adjoint_equals_the_dense_formula before it")
    where = max(worst, key=worst.__getitem__)
    record_property("worst_gradient_error", f"{worst[where]:.1e} at {' / '.join(where)}")
    print(f"\nworst gradient error: {worst[where]:.1e} at {' / '.join(where)}")
    assert worst[where] <= BOUND


@pytest.mark.parametrize("backward", ["gmres", pytest.param("unrolled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("problem_name", ["tanh", "two_scale"])
def test_the_gradient_passes_gradcheck(problem_name, backward):
    problem = problem_named(problem_name).rows(torch.tensor([0, 1]))
    solver = LimitedMemoryBroydenSolver(tol=1e-14, max_steps=100)

    def equilibrium(*leaves: Tensor) -> Tensor:
        return flat(problem, solved(problem.bound(*leaves), solver, BACKWARD[backward]))

    # Central differences of step h = 1e-6: rounding 1e-14 / h = 1e-8, truncation h² = 1e-12.
    assert torch.autograd.gradcheck(equilibrium, problem.leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("problem_name", ["tanh", "two_scale", "non_contractive"])
def test_implicit_and_unrolled_agree_through_the_same_solver(problem_name):
    problem = problem_named(problem_name)
    solver = FORWARD["anderson"]
    pair = [gradients(problem, solver, BACKWARD[name]) for name in ("gmres", "unrolled")]
    assert max(relative_errors(*pair)) <= BOUND


def test_the_error_of_a_gradient_is_in_proportion_to_the_tolerance_of_the_backward_solve():
    problem = problem_named("tanh")
    exact = problem.gradient(cotangent(problem))

    def error(tol: float) -> float:
        adjoint = Implicit(solver=GMRES(tol=tol))
        return max(relative_errors(gradients(problem, FORWARD["broyden"], adjoint), exact))

    # tol · amplification (1.6) in v, and a factor of about 10 for the pull-back through tanh
    for tol in (1e-1, 1e-3, 1e-6):
        assert error(tol) <= 20 * tol
    assert error(1e-1) > 1e-6, "a loose solve that is exact would make this test vacuous"


@pytest.mark.parametrize("backward", BACKWARD)
def test_a_sample_that_the_loss_does_not_see_gets_no_gradient(backward):
    problem = problem_named("tanh")
    w = cotangent(problem)
    w[3] = 0
    value = flat(problem, solved(problem, FORWARD["broyden"], BACKWARD[backward]))
    got = torch.autograd.grad(value, problem.leaves, w)
    assert (got[0][3] == 0).all()
    assert max(relative_errors(got, problem.gradient(w))) <= BOUND


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "newton_krylov"])
def test_unrolling_through_a_sample_that_starts_at_rest_gives_no_nan(name):
    # z = 0.9 sin(θ z) + x with x = 0 for sample 0, which is at its equilibrium from the start.
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)

    def value(theta: Tensor, adjoint: AbstractAdjoint) -> Tensor:
        def f(z: Any) -> Tensor:
            return 0.9 * torch.sin(theta * z) + x

        solution = fixed_point(f, torch.zeros_like(x), solver=FORWARD[name], adjoint=adjoint)
        assert isinstance(solution.value, Tensor)
        return solution.value.sum()

    (unrolled,) = torch.autograd.grad(value(theta, Unrolled()), theta)
    (implicit,) = torch.autograd.grad(value(theta, BACKWARD["gmres"]), theta)
    assert float(abs(unrolled - implicit)) <= BOUND * float(abs(implicit))


# Approximate adjoints

APPROXIMATE = [
    *(JacobianFree(), Phantom(), Phantom(steps=1), Phantom(steps=3, damping=1.0)),
    *(Neumann(), Shine()),
]


@pytest.mark.parametrize("adjoint", APPROXIMATE, ids=repr)
@pytest.mark.parametrize("problem_name", ["linear", "tanh", "two_scale"])
def test_an_approximate_gradient_is_finite_and_a_descent_direction(problem_name, adjoint):
    problem = problem_named(problem_name)
    assert problem.contractive
    got = gradients(problem, FORWARD["broyden"], adjoint)
    exact = problem.gradient(cotangent(problem))
    assert all(torch.isfinite(g).all() for g in got)
    inner = sum(float((a * b).sum()) for a, b in zip(got, exact, strict=True))
    assert inner > 0


@pytest.mark.parametrize("adjoint", [*APPROXIMATE, BACKWARD["picard"]], ids=repr)
@each("grad", [True, False])
def test_the_value_does_not_depend_on_the_adjoint(adjoint, grad):
    problem = problem_named("two_scale")
    loose = LimitedMemoryBroydenSolver(tol=1e-2)  # far from converged, where values would differ
    reference = flat(problem, solved(problem, loose, Implicit())).detach()
    with torch.set_grad_enabled(grad):
        value = flat(problem, solved(problem, loose, adjoint))
    assert torch.equal(value.detach(), reference)


def test_one_phantom_step_is_the_damped_jacobian_free_gradient():
    problem = problem_named("tanh")
    half = gradients(problem, FORWARD["broyden"], Phantom(steps=1, damping=0.5))
    whole = gradients(problem, FORWARD["broyden"], JacobianFree())
    assert max(relative_errors([2 * g for g in half], whole)) <= 1e-12  # rounding


def test_phantom_tends_to_the_exact_gradient_with_more_steps():
    problem = problem_named("tanh")
    exact = problem.gradient(cotangent(problem))

    def error(steps: int) -> float:
        adjoint = Phantom(steps=steps, damping=1.0)
        return max(relative_errors(gradients(problem, FORWARD["broyden"], adjoint), exact))

    # The Neumann series leaves out Jᵏ, and ‖J‖₂ = 0.72 at this equilibrium: 0.72⁸⁰ = 4e-12.
    assert error(1) > error(10) > error(80)
    assert error(80) <= BOUND


# Memory


def saved_tensors(adjoint: AbstractAdjoint, max_steps: int) -> int:
    problem = problem_named("tanh")
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return tensor

    solver = Picard(tol=1e-15, max_steps=max_steps)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        solution = solved(problem, solver, adjoint)
    assert int(solution.steps.max()) >= min(max_steps, 20)
    return count


@pytest.mark.parametrize(
    "adjoint", [Implicit(), JacobianFree(), Phantom(), Neumann(), Direct()], ids=repr
)
def test_memory_does_not_grow_with_the_forward_steps(adjoint):
    assert saved_tensors(adjoint, 5) == saved_tensors(adjoint, 50)


def test_the_memory_of_unrolling_does():
    assert saved_tensors(Unrolled(), 50) > 5 * saved_tensors(Unrolled(), 5)


# One backward pass, and another


def test_unrolled_is_differentiable_twice():
    problem = problem_named("tanh").rows(torch.tensor([0]))

    def equilibrium(x: Tensor) -> Tensor:
        bound = problem.bound(x, *problem.parameters)
        return flat(problem, solved(bound, Picard(tol=1e-14, max_steps=200), Unrolled()))

    assert torch.autograd.gradgradcheck(equilibrium, (problem.x,), atol=1e-6)


def test_a_second_backward_pass_with_retain_graph_gives_the_same():
    problem = problem_named("tanh")
    value = flat(problem, solved(problem, FORWARD["broyden"], Implicit()))
    w = cotangent(problem)
    first = torch.autograd.grad(value, problem.leaves, w, retain_graph=True)
    again = torch.autograd.grad(value, problem.leaves, w, retain_graph=True)
    doubled = torch.autograd.grad(value, problem.leaves, 2 * w)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert max(relative_errors(doubled, [2 * g for g in first])) <= 1e-3  # GMRES's default 1e-4


@pytest.mark.parametrize("solver", [GMRES(tol=1e-6), Picard(tol=1e-6, max_steps=100)], ids=repr)
def test_the_backward_report_is_filled_in_by_the_backward_pass(solver):
    problem = problem_named("tanh")
    solution = solved(problem, FORWARD["broyden"], Implicit(solver=solver))
    assert solution.backward.stats is None
    w = cotangent(problem)
    torch.autograd.grad(flat(problem, solution), problem.leaves, w)
    stats = solution.backward.stats
    assert stats is not None
    assert stats.converged.all()
    assert (stats.steps > 0).all()
    assert (stats.nfe > 0).all()
    assert (stats.relative_residual <= 1e-6).all()
    assert (stats.residual <= 1e-6 * 3 * w.norm(dim=1)).all()  # ‖Jᵀv + w‖ < 3 ‖w‖ here


@pytest.mark.parametrize("adjoint", [JacobianFree(), Phantom(), Unrolled()], ids=repr)
def test_adjoints_that_solve_nothing_report_nothing(adjoint):
    problem = problem_named("tanh")
    solution = solved(problem, Picard(), adjoint)
    torch.autograd.grad(flat(problem, solution).sum(), problem.leaves)
    assert solution.backward.stats is None


def test_a_backward_solve_that_reaches_its_limit_keeps_its_best_and_says_so():
    problem = problem_named("nearly_singular")
    solution = solved(problem, FORWARD["broyden"], Implicit(solver=GMRES(tol=1e-10, max_steps=2)))
    got = torch.autograd.grad(flat(problem, solution), problem.leaves, cotangent(problem))
    assert solution.backward.stats is not None
    assert (solution.backward.stats.status == Status.STEP_LIMIT).all()
    assert all(torch.isfinite(g).all() for g in got)
