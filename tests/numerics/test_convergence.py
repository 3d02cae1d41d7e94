"""CONVERGED means an equilibrium: which solves must not have that status, and which must.

Every test that compares ‖f(z) − z‖ with ‖f(z)‖ also passes where an iteration only makes ‖z‖ grow
(NonlinearSolve.jl issue 1149), and any test passes once z + g rounds to z.
"""

import warnings
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

import fastdeq
from fastdeq.adjoints import Implicit
from fastdeq.krylov import GMRES
from fastdeq.solution import SolveResult, Status
from fastdeq.solvers import LimitedMemoryBroydenSolver, Picard, solve
from fastdeq.solvers.termination import TerminationMode
from tests.loops import each
from tests.problems import SOLVERS

MODES: tuple[TerminationMode, ...] = get_args(TerminationMode)
WITHOUT_END = (Status.DIVERGED, Status.STALLED)


def every_solver_slow_for(*slow: str) -> pytest.MarkDecorator:
    """Every solver; for those in `slow` the test takes more than three seconds."""
    marks = dict.fromkeys(slow, pytest.mark.slow)
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks.get(name, ())) for name in SOLVERS]
    )


every_solver = every_solver_slow_for()


class PreNorm(nn.Module):
    """A pre-norm transformer block: f(z) = z + bounded, an asymptotic slope of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        output: Tensor = self.block(z + x)
        return output


def in_every_mode(
    name: str, f: Callable[[Tensor], Tensor], z0: Tensor, **settings
) -> dict[str, SolveResult]:
    """By mode, per sample and over the whole batch, with everything else at its default."""
    made = {}
    for mode in MODES:
        for per_sample in (True, False):
            solver = SOLVERS[name](termination=mode, per_sample=per_sample, **settings)
            with torch.no_grad():
                made[f"{mode}, per_sample={per_sample}"] = solve(solver, f, z0)
    return made


def test_a_pre_norm_block_is_not_converged_at_any_default():
    for seed in range(20):
        torch.manual_seed(seed)
        deq, x = fastdeq.DeepEquilibriumNetwork(PreNorm()), torch.randn(8, 5, 16)
        with torch.no_grad():
            z, solution = deq(x)
        assert {Status(s) for s in solution.status.tolist()} <= set(WITHOUT_END), seed
        # The residual never fell: the iterate that is returned is one from before ‖z‖ ran away.
        assert float(z.norm(dim=2).max()) < 100, seed


@every_solver_slow_for("newton_krylov")
@each("dtype", [torch.float32, torch.float64])
def test_a_constant_residual_is_not_convergence_in_any_mode(name, dtype):
    # f(z) = z + 1 has no equilibrium. For Newton, 1 − f' = 0 leaves it where it is.
    results = in_every_mode(name, lambda z: z + 1, torch.zeros(3, 4, dtype=dtype))
    for where, result in results.items():
        if name == "newton_krylov":
            assert not result.converged.any(), where
        else:
            assert {Status(s) for s in result.status.tolist()} <= set(WITHOUT_END), where
        assert (result.value.abs() <= 20).all(), where


@every_solver_slow_for("newton_krylov")
def test_one_direction_that_runs_away_is_not_convergence(name):
    # 99 entries contract, one has slope 1: of the residual's norm it is a tenth at the start.
    slope = torch.cat((torch.ones(1), torch.full((99,), 0.5)))
    results = in_every_mode(name, lambda z: slope * z + 1, torch.zeros(2, 100))
    for where, result in results.items():
        assert not result.converged.any(), where


def can_express(where: str, dtype: torch.dtype) -> bool:
    """Whether a residual of 1e-3 exists at 2e6: in float32, rounding alone makes 0.1."""
    return where.startswith("rel") or dtype == torch.float64


@every_solver
@each("dtype", [torch.float32, torch.float64])
def test_a_large_equilibrium_is_converged_in_every_mode_that_can_express_it(name, dtype):
    # vcab3 takes 78 steps in the absolute modes, others fewer than the default of 50.
    results = in_every_mode(
        name, lambda z: 0.5 * z + 1e6, torch.zeros(3, 4, dtype=dtype), max_steps=200
    )
    for where, result in results.items():
        if can_express(where, dtype):
            assert result.converged.all(), where
        exact = torch.full_like(result.value, 2e6)
        torch.testing.assert_close(result.value, exact, rtol=3e-3, atol=0)


@every_solver
@each("size", [1.0, 2e6])
def test_a_start_at_the_solution_is_converged_at_once_in_every_mode(name, size):
    z0 = torch.full((3, 4), size)
    for where, result in in_every_mode(name, lambda z: 0.5 * z + size / 2, z0).items():
        assert result.converged.all(), where
        assert result.nfe.tolist() == [1, 1, 1], where
        assert torch.equal(result.value, z0), where


@every_solver
def test_a_start_beside_a_large_solution_is_converged_in_every_mode(name):
    # One unit of rounding away: the residual is at rounding level from the start on.
    z0 = torch.full((3, 4), 2e6) - 0.125
    for where, result in in_every_mode(name, lambda z: 0.5 * z + 1e6, z0).items():
        if can_express(where, z0.dtype) or name == "picard":  # whose next iterate is the solution
            assert result.converged.all(), where


@every_solver
def test_a_solution_at_zero_is_converged_in_every_mode_that_can_express_it(name):
    # A relative test can express it only by reaching 0 exactly, as quasi-Newton methods do here.
    for where, result in in_every_mode(name, lambda z: 0.5 * z, torch.ones(3, 4)).items():
        if where.startswith("abs"):
            assert result.converged.all(), where
        assert float(result.residual.max()) < 2e-3, where


@every_solver
def test_an_equilibrium_far_from_a_start_that_is_almost_one_is_found(name):
    # z = 0 is almost an equilibrium, and repels: the residual grows a hundredfold before it falls.
    def f(z: Tensor) -> Tensor:
        return torch.tanh(4 * z + 1e-3)

    solver = SOLVERS[name](max_steps=200, tol=1e-5)
    with torch.no_grad():
        result = solve(solver, f, torch.zeros(1, 3))
        exact = torch.ones(1, 3)
        for _ in range(50):  # contracts there by 4 (1 − z²) = 0.005
            exact = f(exact)
    assert result.converged.all()
    if float(result.value.abs().max()) > 0.1:  # Newton and Broyden step to the root beside 0
        torch.testing.assert_close(result.value, exact, rtol=1e-4, atol=0)


def test_of_equal_objectives_the_last_iterate_is_returned():
    # ‖f(z) − z‖ / ‖f(z)‖ is 1 at every iterate of f(z) = z / 2, the residual halves.
    solution = fastdeq.fixed_point(lambda z: 0.5 * z, torch.ones(3, 4), solver=Picard())
    assert (solution.status == Status.STEP_LIMIT).all()
    torch.testing.assert_close(solution.value, torch.full((3, 4), 0.5**51))
    torch.testing.assert_close(solution.residual, torch.full((3,), 2 * 0.5**51))


def test_the_best_iterate_is_the_one_of_the_smallest_residual_though_a_ratio_fluctuates():
    turn = torch.tensor([[0.0, 0.9], [-0.3, 0.0]])  # ‖f(z)‖ shrinks by 0.9 and by 0.3 in turn
    solver = Picard(max_steps=41)
    result = solve(solver, lambda z: z @ turn, torch.ones(1, 2), trace="residuals")
    assert result.trace is not None
    assert float(result.residual) == float(result.trace.residuals.min())
    assert float(result.residual) < 1e-8


@each("solver", [GMRES(), Picard(), LimitedMemoryBroydenSolver()])
def test_a_singular_backward_solve_is_not_converged(solver):
    # At an equilibrium where J = I in one direction, (I − Jᵀ) v = w has no solution for this w.
    slope = torch.tensor([1.0, 0.5, 0.2])
    x = torch.zeros(2, 3, requires_grad=True)
    adjoint = Implicit(solver=solver)
    solution = fastdeq.fixed_point(lambda z: slope * z + x, torch.zeros(2, 3), adjoint=adjoint)
    assert solution.converged.all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where it diverges, it warns
        assert isinstance(solution.value, Tensor)
        solution.value.sum().backward()
    assert solution.backward.stats is not None
    assert {Status(s) for s in solution.backward.stats.status.tolist()} <= set(WITHOUT_END)
    assert x.grad is not None
    # In the singular direction it is w, or w times the solve's polynomial at 0: not of order 1/0.
    assert (x.grad[:, 0].abs() < 10).all()


def test_a_large_cotangent_is_still_solved():
    # The backward solve's own large equilibrium: w of 1e6.
    x = torch.zeros(2, 3, requires_grad=True)
    solution = fastdeq.fixed_point(
        lambda z: 0.5 * z + x, torch.ones(2, 3), adjoint=Implicit(solver=Picard(tol=1e-4))
    )
    assert isinstance(solution.value, Tensor)
    (1e6 * solution.value).sum().backward()
    assert solution.backward.stats is not None
    assert solution.backward.stats.converged.all()
    torch.testing.assert_close(x.grad, torch.full((2, 3), 2e6), rtol=2e-4, atol=0)
