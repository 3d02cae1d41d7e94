"""The Runge–Kutta and Adams methods behind the continuous solvers: orders, tables, costs."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdeq.norms import PerSample
from fastdeq.notation import FlatMap
from fastdeq.solvers import ContinuousSolver, Iterate, Picard, Problem, solve
from fastdeq.solvers.continuous.solver import METHODS
from fastdeq.solvers.continuous.tableaux import BS3, TSIT5, Tableau
from tests.loops import each
from tests.numerics.solves import run
from tests.problems import CONTINUOUS, FACTORIES, problem_named

ORDERS = {"tsit5": 5, "bs3": 3, "vcab3": 3}
every_method = pytest.mark.parametrize("name", CONTINUOUS)
every_tableau = each("tableau", [BS3, TSIT5])


def integrate(
    name: str, slope: FlatMap, z0: Tensor, grid: Tensor, exact_start: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor], Problem]:
    """Step dz/dt = slope(z) by the method object on the given steps, (K, B) or (K,).

    exact_start: states to put in place of the first computed ones. Returns the end, the local error
    estimates and the evaluations.
    """
    method: Any = METHODS[name]
    problem = Problem(lambda z: z + slope(z), z0, PerSample())
    at = problem.evaluate(z0)
    memory = method.start(at)
    everyone = torch.ones(len(z0), dtype=torch.bool)
    errors = []
    for k, h in enumerate(grid):
        h = h.expand(len(z0))
        trial = method.propose(problem, at, h, memory)
        errors.append(trial.error)
        end, g = trial.end.z, trial.end.g
        if exact_start is not None and k < len(exact_start):
            end = exact_start[k]
            g = problem.evaluate(end).g
        elif trial.known is not None and not trial.known.all():
            g = problem.evaluate(end).g
        memory = method.accepted(memory, at, h, everyone)
        at = Iterate(end, g)
    return at.z, errors, problem


def turning(z: Tensor) -> Tensor:
    """A point on a circle of radius r turns by r² per unit of time: nonlinear in both entries."""
    return torch.stack((-z[:, 1], z[:, 0]), dim=1) * z.square().sum(dim=1, keepdim=True)


def turned(z: Tensor, t: float) -> Tensor:
    angle = z.square().sum(dim=1) * t
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack((cos * z[:, 0] - sin * z[:, 1], sin * z[:, 0] + cos * z[:, 1]), dim=1)


START = torch.tensor([[1.0, 0.2], [0.3, -0.9]], dtype=torch.float64)


def observed_orders(name: str, grids: list[Tensor]) -> list[float]:
    """log₂ of how the error at t = 1 falls from one grid to the next, twice as fine."""
    exact = turned(START, 1.0)
    errors = [float((integrate(name, turning, START, g)[0] - exact).norm()) for g in grids]
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@every_method
def test_the_error_falls_with_the_order_of_the_method(name):
    # Fine enough for the leading term, coarse enough for rounding (1e-15) to be negligible.
    counts = (32, 64, 128) if name == "tsit5" else (64, 128, 256)
    grids = [torch.full((n,), 1 / n, dtype=torch.float64) for n in counts]
    # The next term of the error expansion bends the slope by O(h): a quarter of an order at most.
    assert observed_orders(name, grids) == pytest.approx([ORDERS[name]] * 2, abs=0.25)


@every_method
def test_the_order_holds_on_steps_of_unequal_size(name):
    def grid(n: int) -> Tensor:
        """Steps that swing by a factor 3 about the mean, smoothly, so that n → 2n halves each."""
        t = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        return (t + 0.5 * torch.sin(4 * math.pi * t) / (4 * math.pi)).diff()

    counts = (48, 96, 192) if name == "tsit5" else (128, 256, 512)
    grids = [grid(n) for n in counts]
    assert observed_orders(name, grids) == pytest.approx([ORDERS[name]] * 2, abs=0.25)


@every_method
def test_halving_one_step_shrinks_its_error_estimate_by_the_order_of_control(name):
    # The estimate is the error of the embedded method of one order less: h^order.
    def estimate(h: float) -> float:
        grid = torch.full((3,), h, dtype=torch.float64)
        return float(integrate(name, turning, START, grid)[1][-1].norm())

    ratio = math.log2(estimate(0.02) / estimate(0.01))
    assert ratio == pytest.approx(METHODS[name].order, abs=0.25)
    assert METHODS[name].order == ORDERS[name]


# Tables


def stages(tableau: Tableau) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A (s × s), b, the error weights and the abscissae c = A 1."""
    size = len(tableau.error)
    a = torch.zeros(size, size, dtype=torch.float64)
    for i, row in enumerate(tableau.a, start=1):
        assert len(row) == i, "an explicit method's rows lie below the diagonal"
        a[i, :i] = torch.tensor(row, dtype=torch.float64)
    return a, a[-1], torch.tensor(tableau.error, dtype=torch.float64), a.sum(dim=1)


def elementary_weights(a: Tensor, c: Tensor) -> dict[int, list[tuple[Tensor, float]]]:
    """For every rooted tree its vector Φ and 1/γ, by order: b · Φ = 1/γ up to the order of b
    (Hairer, Nørsett & Wanner, Solving ODEs I, table II.2.1)."""
    ac, acc = a @ c, a @ c**2
    return {
        1: [(torch.ones_like(c), 1.0)],
        2: [(c, 1 / 2)],
        3: [(c**2, 1 / 3), (ac, 1 / 6)],
        4: [(c**3, 1 / 4), (c * ac, 1 / 8), (acc, 1 / 12), (a @ ac, 1 / 24)],
        5: [
            (c**4, 1 / 5),
            (c**2 * ac, 1 / 10),
            (c * acc, 1 / 15),
            (c * (a @ ac), 1 / 30),
            (ac**2, 1 / 20),
            (a @ c**3, 1 / 20),
            (a @ (c * ac), 1 / 40),
            (a @ acc, 1 / 60),
            (a @ (a @ ac), 1 / 120),
        ],
    }


def worst_defect(weights: Tensor, a: Tensor, c: Tensor, order: int) -> float:
    return max(abs(float(weights @ phi) - value) for phi, value in elementary_weights(a, c)[order])


# Published coefficients have 16 digits, and entries up to 13 cancel in products of four: 1e-13.
@every_tableau
def test_the_weights_meet_all_order_conditions_and_none_beyond(tableau):
    a, b, _, c = stages(tableau)
    for order in range(1, tableau.order + 1):
        assert worst_defect(b, a, c, order) < 1e-13, order
    if tableau.order < 5:
        assert worst_defect(b, a, c, tableau.order + 1) > 1e-3


@every_tableau
def test_the_embedded_weights_have_exactly_one_order_less(tableau):
    a, b, error, c = stages(tableau)
    for order in range(1, tableau.order):
        assert worst_defect(b - error, a, c, order) < 1e-13, order
    assert worst_defect(b - error, a, c, tableau.order) > 1e-5


@every_tableau
def test_the_error_weights_sum_to_zero_and_the_weights_to_one(tableau):
    _, b, error, _ = stages(tableau)
    assert float(error.sum()) == pytest.approx(0, abs=1e-15)
    assert float(b.sum()) == pytest.approx(1, abs=1e-15)


@every_tableau
def test_the_last_stage_is_the_derivative_at_the_end(tableau):
    a, _, _, c = stages(tableau)
    assert float(c[-1]) == pytest.approx(1, abs=1e-15)
    name = "bs3" if tableau is BS3 else "tsit5"
    method: Any = METHODS[name]
    problem = Problem(lambda z: z + turning(z), START, PerSample())
    first = problem.evaluate(START)
    trial = method.propose(problem, first, torch.full((2,), 0.1, dtype=torch.float64), None)
    assert trial.known is None, "None means all"
    torch.testing.assert_close(trial.end.g, turning(trial.end.z), rtol=0, atol=1e-15)
    by_weights = START + 0.1 * torch.einsum("s,sbd->bd", a[-1], _all_stages(a, 0.1))
    torch.testing.assert_close(trial.end.z, by_weights, rtol=0, atol=1e-14)


def _all_stages(a: Tensor, h: float) -> Tensor:
    """k₁ … kₛ by the definition kᵢ = g(z + h Σⱼ aᵢⱼ kⱼ), (s, B, D)."""
    k: list[Tensor] = []
    for row in a:
        z = START + h * sum((w * past for w, past in zip(row, k, strict=False)), START * 0)
        k.append(turning(z))
    return torch.stack(k)


# Adams–Bashforth on its own grids


def test_vcab3_integrates_a_quadratic_derivative_exactly_on_any_grid():
    # z = (t, y) with t' = 1, y' = 1 − 2t + 3t²: y = t − t² + t³. Every sample has its own grid.
    def slope(z: Tensor) -> Tensor:
        t = z[:, 0]
        return torch.stack((torch.ones_like(t), 1 - 2 * t + 3 * t**2), dim=1)

    generator = torch.Generator().manual_seed(3)
    grid = 0.02 + 0.3 * torch.rand(20, 4, generator=generator, dtype=torch.float64)
    end, _, _ = integrate("vcab3", slope, torch.zeros(4, 2, dtype=torch.float64), grid)
    t = grid.sum(dim=0)
    torch.testing.assert_close(end[:, 0], t, rtol=1e-13, atol=0)
    torch.testing.assert_close(end[:, 1], t - t**2 + t**3, rtol=1e-12, atol=1e-12)  # rounding


def test_vcab3_sees_no_error_where_the_derivative_is_linear_in_time():
    def slope(z: Tensor) -> Tensor:
        return torch.stack((torch.ones_like(z[:, 0]), 2 * z[:, 0]), dim=1)

    grid = torch.tensor([0.1, 0.3, 0.2, 0.05, 0.4], dtype=torch.float64)
    _, errors, _ = integrate("vcab3", slope, torch.zeros(1, 2, dtype=torch.float64), grid)
    assert max(float(error.abs().max()) for error in errors[2:]) < 1e-14


def test_vcab3_uses_the_coefficients_of_adams_bashforth_on_equal_steps():
    # z₊ = z + h (23 g₀ − 16 g₁ + 5 g₂) / 12
    h = torch.full((3,), 0.1, dtype=torch.float64)
    start = [turned(START, 0.1), turned(START, 0.2)]
    end, _, _ = integrate("vcab3", turning, START, h, exact_start=start)
    g2, g1, g0 = turning(START), turning(start[0]), turning(start[1])
    expected = start[1] + 0.1 * (23 * g0 - 16 * g1 + 5 * g2) / 12
    torch.testing.assert_close(end, expected, rtol=0, atol=1e-14)


def test_vcab3_costs_three_evaluations_while_it_starts_and_one_after():
    n = 10
    grid = torch.full((n,), 0.1, dtype=torch.float64)
    _, _, problem = integrate("vcab3", turning, START, grid)
    assert (problem.take_count() + torch.zeros(2)).tolist() == [1 + 2 * 3 + (n - 2)] * 2


# Costs of the solver


@each("name, evaluations", [("tsit5", 6), ("bs3", 3)])
def test_a_runge_kutta_step_costs_its_stages_less_the_first(name, evaluations):
    problem = problem_named("non_contractive")
    with torch.no_grad():
        result = solve(
            ContinuousSolver(method=name, max_steps=200), problem.flat_f, problem.flat_z0
        )
    assert result.converged.all()
    assert result.nfe.tolist() == (1 + evaluations * result.steps).tolist()


def test_a_rejected_adams_step_costs_no_evaluation():
    # The force of f grows a thousandfold near z = 1, so that steps are rejected on the way there.
    def f(z: Tensor) -> Tensor:
        return z + (1 - z) * (0.5 + 200 / (1 + torch.exp(-60 * (z - 0.6))))

    z0 = torch.zeros(1, 1, dtype=torch.float64)
    solver = ContinuousSolver(method="vcab3", tol=1e-4, ode_tol=1e-4, max_steps=400)
    with torch.no_grad():
        result = solve(solver, f, z0, trace="states")
    assert result.converged.all()
    assert result.trace is not None
    assert result.trace.states is not None
    moved = (result.trace.states.diff(dim=0) != 0).flatten()
    first_two = int(moved.cumsum(0).eq(2).nonzero()[0]) + 1  # steps until BS3 has moved twice
    rejected_later = int((~moved[first_two:]).sum())
    assert rejected_later > 0, "the test needs a rejected Adams step"
    assert int(result.nfe) == 1 + 3 * first_two + int(moved[first_two:].sum())


def tanh_cell(gain: float, size: int = 64) -> FlatMap:
    """tanh(W z + x) with ‖W‖₂ = gain and a row of x per sample, as many as entries; float32."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(2, size, size, generator=generator)
    w = gain * w / torch.linalg.matrix_norm(w, 2)
    return lambda z: torch.tanh(z @ w.mT + x)


@each("name, coarse, fine", [("tsit5", 40, 60), ("vcab3", 32, 50), ("bs3", 25, 40)])
def test_the_default_local_tolerance_takes_few_evaluations(name, coarse, fine):
    # With the tolerance of the equilibrium: 60, 38, 43 at 1e-3 and 134, 141, 162 at 1e-5.
    for tol, most in ((1e-3, coarse), (1e-5, fine)):
        solver = ContinuousSolver(method=name, tol=tol, max_steps=200)
        with torch.no_grad():
            result = solve(solver, tanh_cell(0.9), torch.zeros(64, 64))
        assert result.converged.all(), tol
        assert float(result.nfe.double().mean()) <= most, tol


@each("name", CONTINUOUS)
@each("problem_name", FACTORIES)
def test_every_problem_converges_to_rounding_at_the_default_local_tolerance(name, problem_name):
    if (name, problem_name) == ("vcab3", "nearly_singular"):
        # Its stable steps are at most 0.545 / 1.7 long, the slowest mode decays by exp(−0.02 t):
        # 4,700 steps to 1e-13, and at any `ode_tol` the stall rule ends it before.
        return
    problem = problem_named(problem_name)
    for tol in (1e-5, 1e-9, 1e-13):
        solver = ContinuousSolver(method=name, tol=tol, max_steps=3000)
        result = run(solver, problem)
        assert result.converged[problem.solvable].all(), tol
        assert (result.relative_residual[problem.solvable] <= tol).all(), tol


@each("name", CONTINUOUS)
def test_tol_decides_where_the_path_ends_and_not_how_it_gets_there(name):
    def path(tol: float, ode_tol: float | None) -> Tensor:
        solver = ContinuousSolver(method=name, tol=tol, ode_tol=ode_tol, max_steps=200)
        with torch.no_grad():
            result = solve(solver, tanh_cell(0.9), torch.zeros(64, 64), trace="states")
        assert result.converged.all()
        assert result.trace is not None
        assert result.trace.states is not None
        return result.trace.states[: int(result.steps.min())]

    for ode_tol in (0.5, 1e-3):
        coarse, fine = path(1e-2, ode_tol), path(1e-5, ode_tol)
        assert len(coarse) < len(fine)
        assert torch.equal(coarse, fine[: len(coarse)])
    assert not torch.equal(path(1e-2, 0.5)[:3], path(1e-2, 1e-3)[:3])
    assert torch.equal(path(1e-2, None), path(1e-2, 1e-2))


@every_method
def test_every_sample_has_its_own_clock(name):
    # dz/dt = −c (z − 1) with c = 1 and 50: stability bounds the steps of the second one.
    c = torch.tensor([[1.0], [50.0]], dtype=torch.float64)
    solver = ContinuousSolver(method=name, tol=1e-6, ode_tol=1e-2, max_steps=2000)

    def steps(rows: Tensor) -> list[int]:
        z0 = torch.zeros(len(rows), 1, dtype=torch.float64)
        with torch.no_grad():
            result = solve(solver, lambda z: z - c[rows] * (z - 1), z0)
        assert result.converged.all()
        return [int(n) for n in result.steps]

    assert steps(torch.tensor([0, 1])) == steps(torch.tensor([0])) + steps(torch.tensor([1]))


@every_method
def test_a_tighter_ode_tol_follows_the_flow_more_closely(name):
    problem = problem_named("non_contractive")
    jacobian = problem.jacobian.view(4, 6, 4, 6)[0, :, 0]

    def worst_distance(ode_tol: float) -> float:
        """From the exact flow z* + exp(t (J − I)) (z0 − z*), the nearest point in time."""
        solver = ContinuousSolver(method=name, ode_tol=ode_tol, tol=1e-3, max_steps=4000)
        with torch.no_grad():
            result = solve(solver, problem.flat_f, problem.flat_z0, trace="states")
        times = torch.linspace(0, 12, 4001, dtype=torch.float64)[:, None, None]
        flow = torch.linalg.matrix_exp(times * (jacobian - torch.eye(6, dtype=torch.float64)))
        path = problem.exact[0] + flow @ (problem.flat_z0 - problem.exact)[0]
        assert result.trace is not None
        assert result.trace.states is not None
        return float(torch.cdist(result.trace.states[:, 0], path).amin(dim=1).max())

    loose, tight = worst_distance(1e-1), worst_distance(1e-4)
    assert tight < loose / 5


def test_a_continuous_solver_takes_none_of_its_methods_by_a_wrong_name():
    with pytest.raises(TypeError, match="'tsit5', 'bs3', 'vcab3'"):
        ContinuousSolver(method="rk4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no field 'method'"):
        Picard(method="tsit5")  # type: ignore[call-arg]
