"""Histories in bfloat16: half the memory, the same equilibria."""

import pytest
import torch

from fastdeq import DeepEquilibriumNetwork, export, fixed_point
from fastdeq.adjoints import Unrolled
from fastdeq.history import History, add_combination, project
from fastdeq.nn import TwoLayerCell
from fastdeq.solvers import Anderson, LimitedMemoryBroydenSolver
from tests.loops import each
from tests.numerics.gradients import cotangent, flat, gradients, relative_errors
from tests.problems import problem_named

SOLVERS = (Anderson, LimitedMemoryBroydenSolver)


@each("solver", SOLVERS)
def test_the_equilibrium_is_that_of_a_history_in_the_dtype_of_the_states(solver):
    for name in ("linear", "tanh", "two_scale", "nearly_singular", "non_contractive"):
        problem = problem_named(name)
        found = fixed_point(
            problem.f, problem.z0, solver=solver(tol=1e-12, max_steps=200, history="bfloat16")
        )
        assert bool(found.converged.all())
        assert float((flat(problem, found).detach() - problem.exact).abs().max()) <= 1e-8
        plain = fixed_point(problem.f, problem.z0, solver=solver(tol=1e-12, max_steps=200))
        # Of an ill-conditioned Jacobian, L-Broyden's factors lose what the rounding takes.
        most = 5 if name == "nearly_singular" else 1.5
        assert float(found.nfe.double().mean()) <= most * float(plain.nfe.double().mean())


@each("batch", [1, 5, 16])
def test_rows_take_half_the_memory_and_products_are_computed_in_the_dtype_of_the_states(batch):
    history = History(4, "bfloat16")
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        history.push(torch.randn(batch, 7, generator=generator))
    assert history.rows.dtype == torch.bfloat16
    v, coefficients = torch.randn(batch, 7), torch.randn(batch, 4)
    torch.testing.assert_close(project(history.rows, v), project(history.rows.float(), v))
    torch.testing.assert_close(
        add_combination(v, history.rows, coefficients, keep=2.0, scale=-1.0),
        add_combination(v, history.rows.float(), coefficients, keep=2.0, scale=-1.0),
    )


@each("solver", SOLVERS)
def test_unrolled_gradients_pass_through_it(solver):
    problem = problem_named("tanh")
    found = gradients(problem, solver(tol=1e-12, max_steps=40, history="bfloat16"), Unrolled())
    assert max(relative_errors(found, problem.gradient(cotangent(problem)))) <= 1e-6


@each("solver", SOLVERS)
def test_another_dtype_is_refused(solver):
    with pytest.raises(TypeError, match=r"history is 'float16', but must be 'bfloat16' or None$"):
        solver(history="float16")


@each("solver", SOLVERS)
def test_it_is_refused_where_shapes_are_fixed(solver):
    with pytest.raises(ValueError, match=r"history is for eager solves: leave it or `compile` out"):
        solver(history="bfloat16", compile=True)
    layer = DeepEquilibriumNetwork(TwoLayerCell(4, 3), solver=solver(history="bfloat16"))
    with pytest.raises(ValueError, match=r"leave \w+\.history out"):
        export(layer, torch.zeros(2, 4))
