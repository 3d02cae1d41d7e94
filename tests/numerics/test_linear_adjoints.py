"""Direct, Neumann and Shine: what each claims of v with (I − Jᵀ) v = w; and clipping."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from fastdeq import GMRES, DeepEquilibriumNetwork, fixed_point
from fastdeq.adjoints import AbstractAdjoint, Direct, Implicit, JacobianFree, Neumann, Shine
from fastdeq.solvers import (
    Anderson,
    BroydenSolver,
    LimitedMemoryBroydenSolver,
    Picard,
)
from tests.loops import each
from tests.numerics.gradients import FORWARD, cotangent, flat, gradients, relative_errors, solved
from tests.problems import Problem, problem_named

F64 = torch.float64
PROBLEMS = ("linear", "tanh", "two_scale", "nearly_singular", "non_contractive")
LBROYDEN = FORWARD["lbroyden"]


def error(problem: Problem, adjoint: AbstractAdjoint, solver: Any = LBROYDEN) -> float:
    got = gradients(problem, solver, adjoint)
    return max(relative_errors(got, problem.gradient(cotangent(problem))))


# Direct: exact


@each("per_sample", [True, False])
@each("name", PROBLEMS)
def test_direct_equals_the_dense_formula(name, per_sample):
    assert error(problem_named(name), Direct(per_sample=per_sample)) <= 1e-11


def coupled(problem: Problem) -> Problem:
    def cell(z: Tensor, *leaves: Tensor) -> Tensor:
        output = problem.cell(z, *leaves)
        assert isinstance(output, Tensor)
        return output - 0.5 * output.mean(dim=0)

    return replace(problem, cell=cell)


def test_direct_is_exact_for_a_cell_that_couples_the_batch_with_one_matrix():
    problem = coupled(problem_named("tanh"))
    exact = gradients(problem, LBROYDEN, Implicit(solver=GMRES(tol=1e-13, per_sample=False)))
    got = gradients(problem, LBROYDEN, Direct(per_sample=False))
    assert max(relative_errors(got, exact)) <= 1e-10


@each("adjoint", [Direct(), Shine()])
def test_a_layer_whose_cell_couples_the_batch_refuses_an_adjoint_per_sample(adjoint):
    cell = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))
    solver = LimitedMemoryBroydenSolver(per_sample=False)
    with pytest.raises(ValueError, match=r"set adjoint\.per_sample=false"):
        DeepEquilibriumNetwork(cell, solver=solver, adjoint=adjoint)


def test_direct_has_derivatives_of_higher_order_and_in_forward_mode():
    problem = problem_named("tanh")
    x = problem.x.detach()

    def value(x: Tensor) -> Tensor:
        bound = problem.bound(x, *(p.detach() for p in problem.parameters))
        return flat(problem, solved(bound, LBROYDEN, Direct(order=2)))

    assert torch.autograd.gradgradcheck(
        value, (x.requires_grad_(),), atol=1e-6, rtol=1e-5, fast_mode=True
    )
    by_forward = torch.func.jacfwd(value)(x.detach())
    torch.testing.assert_close(by_forward, torch.func.jacrev(value)(x.detach()))
    mapped = torch.vmap(value)(torch.stack((x, 2 * x)).detach())
    torch.testing.assert_close(mapped[0], value(x))


def test_a_state_that_is_too_large_for_direct_is_refused_before_the_solve():
    def never(z: Any) -> Any:
        raise AssertionError("f was evaluated")

    for adjoint in (Direct(max_dim=8), Direct(max_dim=20, per_sample=False)):
        with pytest.raises(ValueError, match="use the Implicit adjoint, or raise max_dim"):
            fixed_point(never, torch.zeros(3, 9), adjoint=adjoint)


def test_a_singular_matrix_falls_back_to_the_jacobian_free_gradient():
    x = torch.ones(2, 3, dtype=F64, requires_grad=True)
    gain = torch.tensor([[1.0], [0.5]], dtype=F64)
    start = torch.zeros(2, 3, dtype=F64)
    solver = Picard(max_steps=3)
    value = fixed_point(lambda z: gain * z + x, start, solver=solver, adjoint=Direct()).value
    assert isinstance(value, Tensor)
    with pytest.warns(RuntimeWarning, match="backward solve failed for 1 of 2"):
        (grad,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(grad, torch.tensor([[1.0] * 3, [2.0] * 3], dtype=F64))


# Neumann: a truncated series


def test_neumann_adds_the_terms_that_it_states():
    problem = problem_named("linear")
    jacobian, w = problem.jacobian, cotangent(problem)
    v = term = w.reshape(-1)
    for _ in range(3):
        term = jacobian.mT @ term
        v = v + term
    expected = torch.autograd.grad(problem.flat_f(problem.exact), problem.leaves, v.view_as(w))
    got = gradients(problem, LBROYDEN, Neumann(steps=3))
    assert max(relative_errors(got, expected)) <= 1e-10


def test_neumann_tends_to_the_exact_gradient_of_a_contraction():
    problem = problem_named("tanh")
    errors = [error(problem, Neumann(steps=steps)) for steps in (1, 5, 20, 80)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1e-8  # ‖J‖₂ = 0.72 here, and 0.72⁸⁰ = 4e-12
    assert error(problem, JacobianFree()) > errors[0]


# Shine: the forward solve's inverse


@each("solver", [LimitedMemoryBroydenSolver(tol=1e-9), BroydenSolver(tol=1e-9)])
def test_shine_is_exact_where_the_state_moved_in_all_directions(solver):
    # One number per sample: the secant equation determines B.
    gain = torch.linspace(-0.8, 0.8, 5, dtype=F64)[:, None].requires_grad_()
    x = torch.linspace(0.5, 1, 5, dtype=F64)[:, None]

    def gradient(adjoint: AbstractAdjoint) -> Tensor:
        start = torch.zeros(5, 1, dtype=F64)
        value = fixed_point(
            lambda z: torch.tanh(gain * z + x), start, solver=solver, adjoint=adjoint
        ).value
        assert isinstance(value, Tensor)
        return torch.autograd.grad(value.sum(), gain)[0]

    # The secant's slope is behind by the last step but one, about the root of the tolerance.
    torch.testing.assert_close(gradient(Shine()), gradient(Direct()), rtol=1e-3, atol=0)


@each("solver", [LBROYDEN, FORWARD["broyden"]])
@each("name", ["linear", "tanh", "two_scale"])
def test_shine_is_nearer_to_the_exact_gradient_than_the_jacobian_free_one(name, solver):
    problem = problem_named(name)
    free = error(problem, JacobianFree(), solver)
    shine = error(problem, Shine(), solver)
    assert shine < 0.8 * free
    # Steps of GMRES refine it to the exact gradient.
    assert error(problem, Shine(steps=3), solver) < 0.1 * shine
    assert error(problem, Shine(steps=40, tol=1e-12), solver) <= 1e-8


def test_shine_makes_no_product_with_the_jacobian_and_reports_those_of_its_refinement():
    problem = problem_named("tanh")
    for steps in (0, 4):
        solution = solved(problem, LBROYDEN, Shine(steps=steps, tol=1e-12))
        torch.autograd.grad(flat(problem, solution).sum(), problem.leaves)
        stats = solution.backward.stats
        assert (stats is None) == (steps == 0)
        assert stats is None or int(stats.steps.max()) == 4


def test_the_inverse_of_a_batch_is_that_of_its_samples_where_the_memory_holds_all_steps():
    problem = problem_named("tanh")
    # Samples end after 4 to 9 steps. The last step is far from rounding.
    solver = LimitedMemoryBroydenSolver(tol=1e-5, max_steps=60, memory=60)
    together = gradients(problem, solver, Shine())[0]
    for i in range(len(problem.x)):
        part = problem.rows(torch.tensor([i]))
        value = flat(part, solved(part, solver, Shine()))
        (alone,) = torch.autograd.grad(value, part.x, cotangent(problem)[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-7, atol=1e-9)


def test_shine_refuses_a_solver_without_an_inverse_and_transforms_with_the_cure():
    def never(z: Any) -> Any:
        raise AssertionError("f was evaluated")

    for solver in (Picard(), Anderson()):
        with pytest.raises(ValueError, match="use LimitedMemoryBroydenSolver or BroydenSolver"):
            fixed_point(never, torch.zeros(2, 3), solver=solver, adjoint=Shine())

    def loss(x: Tensor) -> Any:
        return fixed_point(lambda z: 0.5 * z + x, torch.zeros(2, 3), adjoint=Shine()).value

    with pytest.raises(RuntimeError, match="use the Implicit adjoint"):
        torch.func.jacrev(loss)(torch.ones(2, 3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2, 3), torch.ones(2, 3))
        with pytest.raises(RuntimeError, match="no forward mode: use the Implicit adjoint"):
            loss(dual)


# All of them


@each("adjoint", [Neumann(), Shine(), Shine(steps=3), Implicit(clip=2.0)])
def test_a_second_derivative_of_an_approximate_gradient_is_refused(adjoint):
    problem = problem_named("tanh")
    value = flat(problem, solved(problem, LBROYDEN, adjoint)).sum()
    (first,) = torch.autograd.grad(value, problem.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once, not twice: use Implicit\(order=2\)"):
        torch.autograd.grad(first.sum(), problem.x)


@each("adjoint", [Neumann(), Direct(), Shine()])
def test_gradients_under_autocast_are_near_those_without(adjoint):
    weight = (torch.randn(8, 8) / 8).requires_grad_()
    x = torch.randn(3, 8)

    def gradient(autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = fixed_point(
                lambda z: torch.tanh(z @ weight + x), torch.zeros(3, 8), adjoint=adjoint
            ).value
        assert isinstance(value, Tensor)
        return torch.autograd.grad(value.sum(), weight)[0]

    got, expected = gradient(True), gradient(False)
    assert float((got - expected).norm() / expected.norm()) <= 0.1


# Clipping


def test_clipping_bounds_v_of_each_sample_and_leaves_the_others_alone():
    # v = w / (1 − gain).
    gain = torch.tensor([[0.2], [0.9], [0.99]], dtype=F64)
    x = torch.ones(3, 4, dtype=F64, requires_grad=True)

    def gradient(clip: float | None) -> Tensor:
        adjoint = Implicit(solver=GMRES(tol=1e-12), clip=clip)
        start = torch.zeros(3, 4, dtype=F64)
        value = fixed_point(lambda z: gain * z + x, start, adjoint=adjoint).value
        assert isinstance(value, Tensor)
        return torch.autograd.grad(value.sum(), x)[0]

    torch.testing.assert_close(gradient(None)[:, 0], (1 / (1 - gain))[:, 0])
    clipped = torch.tensor([1 / 0.8, 5.0, 5.0], dtype=F64)
    torch.testing.assert_close(gradient(5.0)[:, 0], clipped)


def test_clipping_with_higher_derivatives_is_refused():
    with pytest.raises(ValueError, match="leave one of the two out"):
        Implicit(clip=1.0, order=2)
