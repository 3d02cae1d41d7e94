"""Derivatives of derivatives: right, or approximate as documented, or refused; never silently wrong
(locuslab/deq issue 25, torchopt issue 223)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdeq import GMRES, DeepEquilibriumNetwork, fixed_depth, fixed_point
from fastdeq.adjoints import AbstractAdjoint, Implicit, JacobianFree, Phantom, Unrolled
from fastdeq.nn import DenseCell, ExplicitNetwork, UnrolledNetwork
from fastdeq.regularizers import jacobian_loss
from fastdeq.solvers import AbstractSolver, Picard
from tests.cells import DenseTanh
from tests.loops import each
from tests.numerics.gradients import BACKWARD, FORWARD, flat, relative_errors, solved
from tests.problems import SOLVERS, Problem, problem_named

F64 = torch.float64
AT = 0.3


def scalar_equilibrium(a: Tensor, adjoint: AbstractAdjoint, solver: Any = None) -> Tensor:
    """z* of f = tanh(a z + a² + 0.5)."""
    solver = Picard(tol=1e-15, max_steps=200) if solver is None else solver
    start = torch.zeros(1, 1, dtype=F64)
    found = fixed_point(
        lambda z: torch.tanh(a * z + a**2 + 0.5), start, solver=solver, adjoint=adjoint
    )
    assert isinstance(found.value, Tensor)
    return found.value.sum()


def first_and_second(value: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    a = torch.tensor(AT, dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(value(a), a, create_graph=True)
    (second,) = torch.autograd.grad(first, a)
    return first.item(), second.item()


def exact() -> tuple[float, float]:
    """dz*/da and d²z*/da² by differentiating artanh z = a z + a² + 0.5 by hand."""
    z = float(scalar_equilibrium(torch.tensor(AT, dtype=F64), Implicit()))
    # z' = s (z + a z' + 2 a) with s = 1 − z², and once more with s' = −2 z z'.
    s = 1 - z * z
    first = s * (z + 2 * AT) / (1 - s * AT)
    inner = z + AT * first + 2 * AT
    second = (-2 * z * first * inner + s * (2 * first + 2)) / (1 - s * AT)
    return first, second


# Implicit: exact up to its order, refused beyond

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear in z*": lambda z: z.sum(),
    "quadratic": lambda z: z.square().sum(),
}


def cell(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(z @ w + x)


def small() -> tuple[Tensor, Tensor]:
    """x, (2, 3), and w, (3, 3), with ‖w‖ < 0.8."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(4), dtype=F64)
    return draw(2, 3).requires_grad_(), (draw(3, 3) / 5).requires_grad_()


def equilibrium(solver: AbstractSolver, adjoint: AbstractAdjoint) -> Callable[..., Tensor]:
    def value(x: Tensor, w: Tensor) -> Tensor:
        start = torch.zeros_like(x)
        found = fixed_point(lambda z: cell(z, x, w), start, solver=solver, adjoint=adjoint).value
        assert isinstance(found, Tensor)
        return found

    return value


def of_order(adjoint: AbstractAdjoint, order: int) -> Implicit:
    assert isinstance(adjoint, Implicit)
    return replace(adjoint, order=order)


@each(
    "solver, adjoint",
    [
        *((solver, BACKWARD["gmres"]) for solver in FORWARD.values()),
        *((FORWARD["lbroyden"], BACKWARD[name]) for name in FORWARD),
    ],
)
def test_first_and_second_derivatives_of_implicit_pass_the_checks_of_autograd(solver, adjoint):
    value = equilibrium(solver, of_order(adjoint, 2))
    # Central differences of step 1e-6 of solves to 1e-13.
    options: Any = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-5, "fast_mode": True}
    assert torch.autograd.gradcheck(value, small(), **options)
    assert torch.autograd.gradgradcheck(lambda *given: value(*given).sin(), small(), **options)


@each("adjoint", [BACKWARD["gmres"], BACKWARD["anderson"], BACKWARD["lbroyden"]])
@each("order", [1, 2, 3, 4])
def test_derivatives_of_implicit_are_those_of_unrolled_up_to_its_order(order, adjoint):
    """Mixed ones, in the directions of one random vector per leaf, of a loss that is not linear."""

    def derivatives(adjoint: AbstractAdjoint) -> list[Tensor]:
        leaves = small()
        draw = torch.Generator().manual_seed(1)
        found = [equilibrium(FORWARD["picard"], adjoint)(*leaves).exp().sum()]
        for _ in range(order):
            grads = torch.autograd.grad(found[-1], leaves, create_graph=True)
            directions = [torch.randn(g.shape, generator=draw, dtype=F64) for g in grads]
            found.append(
                torch.stack([(g * d).sum() for g, d in zip(grads, directions, strict=True)]).sum()
            )
        return found

    exact = derivatives(Unrolled())
    for got, expected in zip(derivatives(of_order(adjoint, order)), exact, strict=True):
        assert got.item() == pytest.approx(expected.item(), rel=1e-8)


@each("order", [1, 2, 3])
def test_the_derivatives_of_the_public_example_are_exact(order):
    adjoint = Implicit(solver=GMRES(tol=1e-13), order=order)
    a = torch.tensor(AT, dtype=F64, requires_grad=True)
    found = [scalar_equilibrium(a, adjoint)]
    for _ in range(order):
        found += torch.autograd.grad(found[-1], a, create_graph=True)
    # The third by central differences of the second one's formula.
    expected = [*exact(), -13.440162294572][:order]
    assert [each.item() for each in found[1:]] == pytest.approx(expected, rel=1e-10)


@each("loss", LOSSES)
@each("order", [1, 2])
@pytest.mark.parametrize("solver", [GMRES(tol=1e-12), Picard(tol=1e-12, max_steps=200)], ids=repr)
@pytest.mark.parametrize("problem_name", ["linear", "tanh", "two_scale"])
def test_one_derivative_more_than_the_order_is_refused_with_the_cure(
    problem_name, solver, order, loss
):
    problem = problem_named(problem_name)
    adjoint = Implicit(solver=solver, order=order)
    value = LOSSES[loss](flat(problem, solved(problem, FORWARD["broyden"], adjoint)))
    plain = torch.autograd.grad(value, problem.leaves, retain_graph=True)
    usable = torch.autograd.grad(value, problem.leaves, create_graph=True)
    for one, other in zip(plain, usable, strict=True):
        assert torch.equal(one, other), "the first derivative does not depend on the graph"
    if order == 2:
        one = sum((each.square().sum() for each in usable), torch.zeros((), dtype=F64))
        usable = torch.autograd.grad(one, problem.leaves, create_graph=True)
    message = rf"Implicit\(order={order}\) can be differentiated .*: set order={order + 1}"
    for first in usable:
        for leaf in problem.leaves:
            with pytest.raises(RuntimeError, match=message):
                torch.autograd.grad(first.square().sum(), leaf, retain_graph=True)


def second(problem: Problem, adjoint: AbstractAdjoint, **options: Any) -> list[Tensor]:
    """The gradient of the squared norm of a gradient."""
    solution = fixed_point(
        problem.f, problem.z0, solver=FORWARD["broyden"], adjoint=adjoint, **options
    )
    value = flat(problem, solution).square().sum()
    first = torch.autograd.grad(value, problem.leaves, create_graph=True)
    norm = sum((one.square().sum() for one in first), torch.zeros((), dtype=F64))
    return list(torch.autograd.grad(norm, problem.leaves))


@pytest.mark.parametrize("problem_name", ["linear", "tanh", "two_scale", "non_contractive"])
def test_second_derivatives_of_every_problem_are_those_of_unrolled(problem_name):
    problem = problem_named(problem_name)
    got = second(problem, of_order(BACKWARD["gmres"], 2))
    assert max(relative_errors(got, second(problem, Unrolled()))) <= 1e-7


def test_second_derivatives_of_a_cell_that_couples_the_batch_are_exact():
    plain = problem_named("tanh")

    def coupled(z: Tensor, *leaves: Tensor) -> Tensor:
        output = plain.cell(z, *leaves)
        assert isinstance(output, Tensor)
        return output - 0.5 * output.mean(dim=0)

    problem = replace(plain, cell=coupled)
    shared = Implicit(solver=GMRES(tol=1e-13, max_steps=60, per_sample=False), order=2)
    assert max(relative_errors(second(problem, shared), second(problem, Unrolled()))) <= 1e-7


def test_second_derivatives_do_not_depend_on_compaction():
    problem = problem_named("tanh")

    def select(rows: Tensor) -> Any:
        x, *parameters = problem.leaves
        return lambda z: problem.cell(z, x[rows], *parameters)

    solver = GMRES(tol=1e-12, max_steps=60)
    plain, compact = (
        second(problem, Implicit(solver=replace(solver, compact=share), order=2), select=select)
        for share in (None, 0.2)
    )
    assert max(relative_errors(compact, plain)) <= 1e-9


def test_a_sample_that_falls_back_has_the_higher_derivatives_of_jacobian_free_gradients():
    # I − Jᵀ is a cyclic shift: GMRES gains nothing in 5 steps.
    size = 12
    shift = torch.roll(torch.eye(size, dtype=F64), 1, 0)
    x = torch.ones(1, size, dtype=F64, requires_grad=True)
    adjoint = Implicit(solver=GMRES(max_steps=5), order=2)
    start = torch.zeros(1, size, dtype=F64)
    value = fixed_point(lambda z: z - z @ shift.T + x**3, start, adjoint=adjoint).value
    assert isinstance(value, Tensor)
    w = torch.eye(size, dtype=F64)[None, 3]
    with pytest.warns(RuntimeWarning, match="no progress"):
        (first,) = torch.autograd.grad(value, x, w, create_graph=True)
    torch.testing.assert_close(first, 3 * w)
    (again,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(again, 6 * w)


def evaluations(order: int, create_graph: bool) -> tuple[int, int, int]:
    """Of f in the forward and in the backward pass, and the products Jᵀ v."""
    problem, count = problem_named("tanh"), 0

    def f(z: Any) -> Any:
        nonlocal count
        count += 1
        return problem.f(z)

    solution = fixed_point(f, problem.z0, adjoint=Implicit(order=order))
    forward = count - int(solution.nfe.max()) + 1
    torch.autograd.grad(flat(problem, solution).sum(), problem.leaves, create_graph=create_graph)
    assert solution.backward.stats is not None
    return (
        forward,
        count - int(solution.nfe.max()) + 1 - forward,
        int(solution.backward.stats.nfe.max()),
    )


def test_the_first_derivative_of_order_one_costs_no_evaluation_beyond_the_closing_one():
    for create_graph in (False, True):
        closing, backward, products = evaluations(1, create_graph)
        assert (closing, backward) == (1, 0)
        assert evaluations(3, create_graph) == (3, 0, products)


def test_forces_of_an_energy_train_its_parameters():
    """As in docs/mathematics.md, against finite differences."""
    torch.manual_seed(0)
    stem, head = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
    deq = DeepEquilibriumNetwork(
        DenseTanh(4, 0.5),
        solver=FORWARD["lbroyden"],
        adjoint=Implicit(solver=GMRES(tol=1e-13), order=2),
    )
    positions = torch.randn(5, 3, dtype=F64, requires_grad=True)
    target = torch.randn(5, 3, dtype=F64)

    def loss() -> Tensor:
        energy = head(deq(stem(positions))[0]).sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=True)
        return (-gradient - target).square().mean()

    weights = [*stem.parameters(), *deq.parameters(), head.weight]
    grads, h = torch.autograd.grad(loss(), weights), 1e-5
    for weight, grad in zip(weights, grads, strict=True):
        direction = torch.randn_like(weight)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * h * direction
            values.append(loss().item())
            with torch.no_grad():
                weight -= sign * h * direction
        # Truncation h² = 1e-10, rounding 1e-13 / h = 1e-8.
        difference = (values[0] - values[1]) / (2 * h)
        assert float((grad * direction).sum()) == pytest.approx(difference, rel=1e-5, abs=1e-7)


def test_what_does_not_pass_through_the_solve_is_still_differentiated_twice():
    problem, head = problem_named("tanh"), torch.ones(8, dtype=F64, requires_grad=True)
    value = flat(problem, solved(problem, FORWARD["broyden"], Implicit()))
    (first,) = torch.autograd.grad((value * head**3).sum(), head, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), head, retain_graph=True)
    torch.testing.assert_close(second, 6 * value.sum(dim=0).detach())
    # d/dx of 3 z* · head² is a first derivative of z*, which Implicit has.
    (mixed,) = torch.autograd.grad(first.sum(), problem.x)
    torch.testing.assert_close(
        mixed, 3 * problem.gradient(torch.ones_like(value))[0], rtol=1e-3, atol=1e-6
    )


@each("order", [1, 2])
def test_the_jacobian_loss_of_a_cell_with_an_equilibrium_inside_needs_order_2(order):
    weight = torch.tensor(0.3, dtype=F64, requires_grad=True)
    adjoint = Implicit(solver=GMRES(tol=1e-13), order=order)

    def loss(adjoint: AbstractAdjoint) -> Tensor:
        def f(z: Any) -> Any:
            start, solver = torch.zeros_like(z), Picard(tol=1e-14, max_steps=100)
            return fixed_point(
                lambda y: torch.tanh(weight * y + z), start, solver=solver, adjoint=adjoint
            ).value

        torch.manual_seed(0)
        return jacobian_loss(f, torch.ones(2, 3, dtype=F64))

    if order == 1:
        with pytest.raises(RuntimeError, match="set order=2"):
            loss(adjoint).backward()
    else:
        (got,), (expected,) = (torch.autograd.grad(loss(a), weight) for a in (adjoint, Unrolled()))
        torch.testing.assert_close(got, expected)


# Unrolled: exact


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "newton_krylov"])
def test_unrolled_has_the_second_derivative_of_the_equilibrium(name):
    solver = SOLVERS[name](tol=1e-14, max_steps=1000)
    got = first_and_second(lambda a: scalar_equilibrium(a, Unrolled(), solver))
    # Derivatives of the iterates converge behind the iterates themselves.
    assert got == pytest.approx(exact(), rel=1e-9)


def test_the_second_derivative_of_the_example_is_the_published_number():
    assert exact() == pytest.approx((0.86176, 0.48545), abs=1e-5)


def test_a_fixed_depth_has_second_derivatives():
    def value(a: Tensor) -> Tensor:
        start = torch.zeros(1, 1, dtype=F64)
        found = fixed_depth(lambda z: torch.tanh(a * z + a**2 + 0.5), start, depth=60)
        assert isinstance(found.value, Tensor)
        return found.value.sum()

    assert first_and_second(value) == pytest.approx(exact(), rel=1e-12)


# Phantom and Jacobian-free: those of their steps


def test_second_derivatives_of_phantom_tend_to_the_exact_one_with_more_steps():
    def error(steps: int) -> float:
        adjoint = Phantom(steps=steps, damping=1.0)
        return abs(first_and_second(lambda a: scalar_equilibrium(a, adjoint))[1] - exact()[1])

    assert error(1) > error(5) > error(20) > error(60)
    assert error(60) <= 1e-12


@each(
    "adjoint, documented",
    [
        (Phantom(), (0.803, 0.330)),
        (Phantom(steps=1, damping=1.0), (0.715, -0.042)),
        (JacobianFree(), (0.715, -0.042)),
    ],
)
def test_approximate_second_derivatives_are_those_that_the_docstrings_name(adjoint, documented):
    got = first_and_second(lambda a: scalar_equilibrium(a, adjoint))
    assert got == pytest.approx(documented, abs=5e-4)


# Neural ODEs: refused


class _Constant(nn.Module):
    """f(z, x) = W z: the output depends on the input through z₀ alone."""

    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Linear(4, 4, dtype=F64)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.state(z)
        return y


@each("loss", ["linear in z*", "quadratic", "times the input"])
@each("starts_at_the_input", [False, True])
def test_a_gradient_of_a_neural_ode_can_be_used_in_a_graph_but_not_differentiated(
    loss, starts_at_the_input
):
    pytest.importorskip("torchdiffeq")
    from fastdeq.nn.neural_ode import NeuralODE

    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    layer = (
        NeuralODE(_Constant(), initializer=ExplicitNetwork(nn.Linear(4, 4, dtype=F64)))
        if starts_at_the_input
        else NeuralODE(DenseCell(4).double())
    )
    losses = {**LOSSES, "times the input": lambda y: (y * x).sum()}
    value = losses[loss](layer(x)[0])
    leaves = (x, *layer.parameters())
    plain = torch.autograd.grad(value, leaves, retain_graph=True)
    usable = torch.autograd.grad(value, leaves, create_graph=True)
    for one, other in zip(plain, usable, strict=True):
        assert torch.equal(one, other)
    for first in usable:
        for leaf in leaves:
            with pytest.raises(RuntimeError, match="once, not twice: use UnrolledNetwork"):
                torch.autograd.grad(first.square().sum(), leaf, retain_graph=True)


def test_the_baseline_that_is_named_instead_has_second_derivatives():
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    layer = UnrolledNetwork(DenseCell(4).double(), steps=3)
    assert torch.autograd.gradgradcheck(lambda x: torch.sin(layer(x)[0]), (x,))
