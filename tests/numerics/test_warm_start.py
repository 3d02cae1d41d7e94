"""The start of the backward solve, v0: it changes the cost of a gradient and not the gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdeq import GMRES, DEQChain, Solution, WidthStackedDEQ, fixed_point
from fastdeq.adjoints import AbstractAdjoint, Implicit, JacobianFree
from fastdeq.nn import DeepEquilibriumNetwork, TwoLayerCell, UnrolledNetwork
from fastdeq.solvers import Anderson
from tests.loops import each
from tests.numerics.gradients import BACKWARD, FORWARD, cotangent, flat, relative_errors
from tests.problems import Problem, problem_named

TIGHT = FORWARD["lbroyden"]
SOLVERS = {
    "gmres": GMRES(tol=1e-12, max_steps=60),
    "whole batch": GMRES(tol=1e-12, max_steps=60, per_sample=False),
    "restarted": GMRES(tol=1e-12, max_steps=400, restart=3),
    "anderson": Anderson(tol=1e-12, max_steps=500),
    "whole batch anderson": Anderson(tol=1e-12, max_steps=500, per_sample=False),
}


def backward(
    problem: Problem, solver: Any, v0: Tensor | None, w: Tensor | None = None
) -> tuple[Any, Solution]:
    solution = fixed_point(
        problem.f, problem.z0, v0=v0, solver=TIGHT, adjoint=Implicit(solver=solver)
    )
    w = cotangent(problem) if w is None else w
    return torch.autograd.grad(flat(problem, solution), problem.leaves, w), solution


def products(solution: Solution) -> Tensor:
    assert solution.backward.stats is not None
    return solution.backward.stats.nfe


@each("name", SOLVERS)
def test_the_gradient_is_exact_from_any_start(name):
    for problem in (problem_named("tanh"), problem_named("two_scale")):
        w = cotangent(problem)
        odd = torch.randn(w.shape, generator=torch.Generator().manual_seed(2), dtype=w.dtype)
        odd[1], odd[2] = torch.nan, 0.0
        exact = problem.gradient(w)
        for v0 in (None, odd, 1e200 * odd, torch.zeros_like(w)):
            got, _ = backward(problem, SOLVERS[name], v0)
            assert max(relative_errors(got, exact)) <= 1e-9


@each("name", SOLVERS)
def test_a_start_at_a_multiple_of_the_answer_takes_no_steps(name):
    problem = problem_named("tanh")
    _, first = backward(problem, BACKWARD["gmres"].solver, None)  # type: ignore[attr-defined]
    assert first.backward.value is not None
    w = 1e-3 * cotangent(problem)  # as when the loss has fallen
    exact = problem.gradient(w)
    _, cold = backward(problem, SOLVERS[name], None, w)
    got, warm = backward(problem, SOLVERS[name], 50 * first.backward.value, w)
    assert max(relative_errors(got, exact)) <= 1e-9
    assert int(products(warm).max()) <= 3
    assert int(products(cold).min()) >= 5


def test_second_derivatives_are_exact_with_a_start():
    problem = problem_named("tanh")
    start = torch.ones_like(cotangent(problem))
    adjoint = Implicit(solver=GMRES(tol=1e-13, max_steps=60), order=2)

    def of_x(x: Tensor, v0: Tensor | None) -> Tensor:
        bound = problem.bound(x, *(p.detach() for p in problem.parameters))
        solution = fixed_point(bound.f, bound.z0, v0=v0, solver=TIGHT, adjoint=adjoint)
        return flat(bound, solution)

    found = []
    for v0 in (None, start):
        x = problem.x.detach().clone().requires_grad_()
        value = (of_x(x, v0) * cotangent(problem)).sum()
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def test_layers_take_a_start_each():
    torch.manual_seed(0)
    x = torch.randn(4, 6)

    def deq() -> DeepEquilibriumNetwork:
        return DeepEquilibriumNetwork(TwoLayerCell(6, 5))

    for module, kept in (
        (deq(), lambda s: s.backward.value),
        (DEQChain(deq()), lambda s: s.backward.value),
        (
            DEQChain(a=deq(), b=deq()),
            lambda s: {k: p.backward.value for k, p in zip("ab", s.parts, strict=True)},
        ),
        (WidthStackedDEQ([deq(), deq()]), lambda s: [part.backward.value for part in s.parts]),
    ):
        counts = []
        v0 = None
        for _ in range(2):
            y, solution = module(x, v0=v0)
            y.sum().backward()
            v0 = kept(solution)
            counts.append(
                sum(
                    float(products(part).sum())
                    for part in (solution.parts if solution.parts else (solution,))
                )
            )
        assert counts[1] < counts[0] / 2


def test_a_start_that_cannot_be_used_is_refused_with_the_cure():
    problem = problem_named("tanh")
    v0 = torch.zeros_like(cotangent(problem))
    cases: tuple[tuple[AbstractAdjoint, Any, str], ...] = (
        (JacobianFree(), v0, "JacobianFree makes no such solve: leave v0 out"),
        (Implicit(), v0[:, 1:], "must be a tensor of the flat state's shape"),
        (Implicit(), "zeros", "v0 is str"),
    )
    for adjoint, start, match in cases:
        with pytest.raises(ValueError, match=match):
            fixed_point(problem.f, problem.z0, v0=start, adjoint=adjoint)
    with pytest.raises(ValueError, match="leave it out for a UnrolledNetwork"):
        UnrolledNetwork(TwoLayerCell(6, 5), steps=3)(torch.zeros(2, 6), v0=torch.zeros(2, 6))
    with pytest.raises(RuntimeError, match=r"within transforms of torch\.func"):
        torch.func.jacrev(lambda x: fixed_point(torch.cos, x, v0=x).value)(torch.zeros(2, 3))
