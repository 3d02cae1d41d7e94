"""Derivatives of derivatives: right, or approximate as documented, or refused; never silently wrong
(locuslab/deq issue 25, torchopt issue 223)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdeq import GMRES, DeepEquilibriumNetwork, fixed_depth, fixed_point
from fastdeq.adjoints import AbstractAdjoint, Implicit, JacobianFree, Phantom, Unrolled
from fastdeq.nn import DenseCell, ExplicitNetwork, UnrolledNetwork
from fastdeq.regularizers import jacobian_loss
from fastdeq.solvers import Picard
from tests.loops import each
from tests.numerics.gradients import FORWARD, flat, solved
from tests.problems import SOLVERS, problem_named

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


# Implicit: refused, always

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear in z*": lambda z: z.sum(),
    "quadratic": lambda z: z.square().sum(),
}
BACKWARD = [Implicit(solver=GMRES(tol=1e-12)), Implicit(solver=Picard(tol=1e-12, max_steps=200))]


@each("loss", LOSSES)
@pytest.mark.parametrize("adjoint", BACKWARD, ids=repr)
@pytest.mark.parametrize("problem_name", ["linear", "tanh", "two_scale"])
def test_a_gradient_of_implicit_can_be_used_in_a_graph_but_not_differentiated(
    problem_name, adjoint, loss
):
    problem = problem_named(problem_name)
    value = LOSSES[loss](flat(problem, solved(problem, FORWARD["broyden"], adjoint)))
    plain = torch.autograd.grad(value, problem.leaves, retain_graph=True)
    usable = torch.autograd.grad(value, problem.leaves, create_graph=True)
    for one, other in zip(plain, usable, strict=True):
        assert torch.equal(one, other)
    for first in usable:
        for leaf in problem.leaves:
            with pytest.raises(RuntimeError, match="once, not twice: use the Unrolled adjoint"):
                torch.autograd.grad(first.square().sum(), leaf, retain_graph=True)


def test_the_second_derivative_of_the_public_example_is_refused_and_not_wrong():
    with pytest.raises(RuntimeError, match="Unrolled"):
        first_and_second(lambda a: scalar_equilibrium(a, Implicit()))


def test_a_second_derivative_by_a_factor_of_the_cotangent_alone_is_refused_too():
    # f does not depend on c; the gradient does, through its cotangent.
    problem, c = problem_named("tanh"), torch.ones(8, dtype=F64, requires_grad=True)
    value = flat(problem, solved(problem, FORWARD["broyden"], Implicit()))
    (first,) = torch.autograd.grad((c * value).sum(), problem.x, create_graph=True)
    with pytest.raises(RuntimeError, match="Unrolled"):
        torch.autograd.grad(first.sum(), c)


def test_forces_of_an_energy_cannot_be_trained_through_implicit_but_through_unrolled():
    stem, cell, head = nn.Linear(3, 4), DenseCell(4), nn.Linear(4, 1)
    x = torch.randn(5, 3, requires_grad=True)
    for adjoint in (Implicit(), Unrolled()):
        deq = DeepEquilibriumNetwork(cell, adjoint=adjoint)
        (forces,) = torch.autograd.grad(head(deq(stem(x))[0]).sum(), x, create_graph=True)
        if isinstance(adjoint, Unrolled):
            forces.square().sum().backward()
        else:
            with pytest.raises(RuntimeError, match="Unrolled"):
                forces.square().sum().backward()


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


def test_the_jacobian_loss_of_a_cell_with_an_equilibrium_inside_is_refused():
    weight = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def f(z: Any) -> Any:
        return fixed_point(lambda y: torch.tanh(weight * y + z), torch.zeros_like(z)).value

    loss = jacobian_loss(f, torch.ones(2, 3, dtype=F64))
    with pytest.raises(RuntimeError, match="Unrolled"):
        loss.backward()


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
