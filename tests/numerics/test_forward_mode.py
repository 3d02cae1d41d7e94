"""Forward-mode derivatives of an equilibrium: right or refused, never None or silently wrong
(jaxopt issue 474, optimistix issue 50)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from fastdeq import (
    GMRES,
    DeepEquilibriumNetwork,
    SkipDeepEquilibriumNetwork,
    fixed_depth,
    fixed_point,
)
from fastdeq.adjoints import AbstractAdjoint, Implicit, JacobianFree, Phantom, Unrolled
from fastdeq.nn import DenseCell, ExplicitNetwork, UnrolledNetwork
from fastdeq.regularizers import jacobian_loss, spectral_radius
from fastdeq.solvers import NewtonKrylov, Picard, solve
from tests.cells import DenseTanh
from tests.loops import each
from tests.numerics.gradients import BACKWARD, FORWARD, TIGHT, flat, solved
from tests.problems import SOLVERS, Problem, problem_named

F64 = torch.float64
ORDER_2 = Implicit(solver=GMRES(tol=TIGHT, max_steps=60), order=2)
TANGENT = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)


def by_dual_level(value: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        found: Tensor | None = forward_ad.unpack_dual(
            value(forward_ad.make_dual(x, tangent))
        ).tangent
        return found


def without_gradients(value: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Any:
    with torch.no_grad():
        return by_dual_level(value, x, tangent)


def by_jvp(value: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    result: Tensor = torch.func.jvp(value, (x,), (tangent,))[1]
    return result


MODES: list[Callable[..., Any]] = [by_dual_level, without_gradients, by_jvp]


def equilibrium(problem: Problem, adjoint: AbstractAdjoint, solver: Any, frozen: bool) -> Any:
    """x ↦ z*, (B, D), and the x at which it is taken."""
    parameters = [p.detach() if frozen else p for p in problem.parameters]
    return lambda x: flat(problem, solved(problem.bound(x, *parameters), solver, adjoint))


def directional(problem: Problem, tangent: Tensor) -> Tensor:
    """dz*/dx · tangent by dense algebra: row i of the batch Jacobian is a gradient."""
    rows = torch.eye(problem.exact.numel(), dtype=F64).view(-1, *problem.exact.shape)
    derivative = torch.stack([(problem.gradient(row)[0] * tangent).sum() for row in rows])
    return derivative.view_as(problem.exact)


@each("frozen", [True, False])
@each("mode", MODES)
@each("adjoint", [BACKWARD["gmres"], BACKWARD["lbroyden"], ORDER_2])
@pytest.mark.parametrize("problem_name", ["linear", "tanh", "two_scale", "non_contractive"])
def test_the_forward_mode_derivative_through_implicit_is_that_of_the_equilibrium(
    problem_name, adjoint, mode, frozen
):
    problem = problem_named(problem_name)
    value = equilibrium(problem, adjoint, FORWARD["anderson"], frozen)
    tangent = TANGENT[: len(problem.x)]
    got = mode(value, problem.x.detach(), tangent)
    torch.testing.assert_close(got, directional(problem, tangent), rtol=1e-8, atol=1e-9)


@each("mode", MODES)
@each("adjoint", [JacobianFree(), Phantom(steps=1, damping=1.0)])
def test_forward_mode_derivatives_of_jacobian_free_adjoints_are_those_of_one_evaluation(
    adjoint, mode
):
    problem = problem_named("tanh")
    value = equilibrium(problem, adjoint, FORWARD["anderson"], frozen=True)
    expected = torch.func.jvp(
        lambda x: problem.bound(x, *(p.detach() for p in problem.parameters)).f(problem.exact),
        (problem.x.detach(),),
        (TANGENT,),
    )[1]
    torch.testing.assert_close(mode(value, problem.x.detach(), TANGENT), expected)


@each("mode", MODES)
def test_newton_krylov_names_the_cure_in_forward_mode(mode):
    problem = problem_named("tanh")
    value = equilibrium(problem, Implicit(), NewtonKrylov(), frozen=True)
    with pytest.raises(RuntimeError, match="use another solver"):
        mode(value, problem.x.detach(), TANGENT)


def test_forward_and_reverse_mode_combine_up_to_the_order():
    problem = problem_named("tanh")
    x, adjoint = problem.x.detach().requires_grad_(), ORDER_2
    value = equilibrium(problem, adjoint, FORWARD["lbroyden"], frozen=True)
    by_reverse = torch.autograd.grad(value(x).exp().sum(), x, create_graph=True)[0]
    (expected,) = torch.autograd.grad((by_reverse * TANGENT).sum(), x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, TANGENT)
        loss = value(dual).exp().sum()
        (gradient,) = torch.autograd.grad(loss, dual, retain_graph=True)
        over_reverse = forward_ad.unpack_dual(gradient).tangent
        tangent = forward_ad.unpack_dual(loss).tangent
    (over_forward,) = torch.autograd.grad(tangent, x)
    torch.testing.assert_close(over_reverse, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(over_forward, expected, rtol=1e-8, atol=1e-9)
    value = equilibrium(problem, Implicit(), FORWARD["lbroyden"], frozen=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, TANGENT)
        with pytest.raises(RuntimeError, match="set order=2"):
            torch.autograd.grad(value(dual).exp().sum(), dual)


@each("mode", MODES)
@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "newton_krylov"])
def test_the_forward_mode_derivative_through_unrolled_is_that_of_the_equilibrium(name, mode):
    problem = problem_named("tanh")
    value = equilibrium(problem, Unrolled(), FORWARD[name], frozen=True)
    got = mode(value, problem.x.detach(), TANGENT)
    torch.testing.assert_close(got, directional(problem, TANGENT), rtol=1e-8, atol=1e-9)


@each("mode", MODES)
def test_a_fixed_depth_has_forward_mode_derivatives(mode):
    problem = problem_named("tanh")

    def value(x: Tensor) -> Tensor:
        bound = problem.bound(x, *(p.detach() for p in problem.parameters))
        return flat(problem, fixed_depth(bound.f, problem.z0, depth=120))

    got = mode(value, problem.x.detach(), TANGENT)
    torch.testing.assert_close(got, directional(problem, TANGENT), rtol=1e-8, atol=1e-9)


def test_an_equilibrium_has_no_tangent_from_its_start():
    problem = problem_named("tanh")
    f, start = problem.f, problem.flat_z0

    def value(z0: Tensor) -> Any:
        return fixed_point(f, z0, solver=FORWARD["anderson"], adjoint=Implicit()).value

    assert by_dual_level(value, start, torch.ones_like(start)) is None


# Layers


def of_layer(layer: nn.Module, where: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The layer's state as a function of its input "x" or of a parameter, and its argument."""
    draw = torch.Generator().manual_seed(2)
    named = {"x": torch.randn(3, 4, generator=draw, dtype=F64), **dict(layer.named_parameters())}

    def value(tensor: Tensor) -> Tensor:
        given = {**named, where: tensor}
        z: Tensor = torch.func.functional_call(layer, given, (given.pop("x"),))[0]
        return z

    return value, named[where].detach()


@each("training", [True, False])
@each("where", ["x", "cell.state.weight"])
def test_layers_have_the_tangents_of_the_input_and_of_parameters(where, training):
    cell = DenseTanh(4, 0.5)
    given: dict[str, Any] = {"solver": FORWARD["lbroyden"], "adjoint": BACKWARD["gmres"]}
    for layer in (
        DeepEquilibriumNetwork(cell, **given),
        SkipDeepEquilibriumNetwork(cell, **given),
        SkipDeepEquilibriumNetwork(cell, nn.Linear(4, 4).double(), **given),
    ):
        layer.double().requires_grad_(False).train(training)
        value, at = of_layer(layer, where)
        tangent, h = torch.ones_like(at), 1e-6
        differences = (value(at + h * tangent) - value(at - h * tangent)) / (2 * h)
        got = by_dual_level(value, at, tangent)
        torch.testing.assert_close(got, differences, rtol=1e-6, atol=1e-7)


def test_an_unrolled_network_has_forward_mode_derivatives():
    layer, x = UnrolledNetwork(DenseTanh(4, 0.5), steps=3), torch.randn(3, 4, dtype=F64)
    tangent = torch.randn_like(x)
    h = 1e-6
    differences = (layer(x + h * tangent)[0] - layer(x - h * tangent)[0]) / (2 * h)
    got = by_dual_level(lambda x: layer(x)[0], x, tangent)
    # Rounding 1e-16 / h = 1e-10, truncation h² = 1e-12.
    torch.testing.assert_close(got, differences, rtol=1e-7, atol=1e-8)


@each("frozen", [True, False])
@each("where", ["x", "cell.state.weight", "initializer.network.weight"])
def test_a_neural_ode_refuses_tangents(where, frozen):
    pytest.importorskip("torchdiffeq")
    from fastdeq.nn.neural_ode import NeuralODE

    start = ExplicitNetwork(nn.Linear(4, 4))
    layer = NeuralODE(DenseCell(4), initializer=start).double().requires_grad_(not frozen)
    value, at = of_layer(layer, where)
    with pytest.raises(RuntimeError, match="NeuralODE: use reverse mode"):
        by_dual_level(value, at, torch.ones_like(at))


# What differentiates in forward mode itself


def test_newton_krylov_inside_a_forward_mode_differentiation_names_the_cure():
    expected = pytest.raises(RuntimeError, match=r"does not nest.*use another solver")
    with expected, forward_ad.dual_level():
        solve(NewtonKrylov(), lambda z: 0.5 * z + 1, torch.zeros(3, 4))


@each("adjoint", [Unrolled(), BACKWARD["gmres"]])
def test_newton_krylov_solves_with_an_equilibrium_inside(adjoint):
    def f(z: Any) -> Any:
        start = torch.zeros_like(z)
        solver = Picard(tol=1e-12, max_steps=200)
        inner = fixed_point(
            lambda y: torch.tanh(0.4 * y + z), start, solver=solver, adjoint=adjoint
        ).value
        assert isinstance(inner, Tensor)
        return 0.5 * inner + 1

    found = fixed_point(f, torch.ones(2, 3, dtype=F64), solver=NewtonKrylov(tol=1e-10))
    assert found.converged.all()
    assert int(found.steps.max()) <= 6, "a Newton step with a wrong Jacobian gains little"


def test_the_spectral_radius_has_no_derivatives_rather_than_a_part_of_them():
    weight, z = torch.randn(4, 4), torch.randn(3, 4)

    def radius(weight: Tensor) -> Tensor:
        return spectral_radius(lambda z: torch.tanh(z @ weight), z)

    assert by_dual_level(radius, weight, torch.ones_like(weight)) is None
    assert not radius(weight.requires_grad_()).requires_grad


def test_the_jacobian_loss_has_the_tangent_of_the_state():
    weight, z = torch.randn(4, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    tangent, h = torch.randn_like(z), 1e-6

    def loss(z: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same ε every time
        return jacobian_loss(lambda z: torch.tanh(z @ weight), z)

    got = by_dual_level(loss, z, tangent)
    differences = (loss(z + h * tangent) - loss(z - h * tangent)) / (2 * h)
    torch.testing.assert_close(got, differences, rtol=1e-6, atol=1e-8)
