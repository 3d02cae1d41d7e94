"""The regularizers against dense Jacobians and finite differences."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.nn.functional import conv2d

from fastdeq import Solution, fixed_depth, fixed_point
from fastdeq.adjoints import Implicit, JacobianFree, Phantom
from fastdeq.krylov import GMRES
from fastdeq.regularizers import (
    correction_loss,
    jacobian_loss,
    residual_loss,
    skip_loss,
    spectral_radius,
)
from fastdeq.solvers import LimitedMemoryBroydenSolver, Picard
from tests.loops import each

F64 = torch.float64


def dense_cell(weight: Tensor, x: Tensor) -> Callable[[Any], Any]:
    return lambda z: torch.tanh(z @ weight.mT + x)


def conv_cell(weight: Tensor, x: Tensor) -> Callable[[Any], Any]:
    return lambda z: torch.tanh(conv2d(z, weight, padding=1) + x)


def doubled(z: Any) -> Any:
    return 2 * z


def constant(z: Any) -> Any:
    return torch.ones_like(z)


def shifted(z: Any) -> Any:
    return z + torch.tensor([1.0, -3.0])


def dense_case() -> tuple[Any, Tensor, Tensor, Tensor]:
    """The cell as a function of its weight, the weight, an input and a state."""
    weight, x, z = (torch.randn(shape, dtype=F64) for shape in ((4, 4), (3, 4), (3, 4)))
    return dense_cell, weight, x, z


def conv_case() -> tuple[Any, Tensor, Tensor, Tensor]:
    weight, x, z = (torch.randn(2, 2, 3, 3, dtype=F64) for _ in range(3))
    return conv_cell, weight, x, z


cases = each("case", [dense_case, conv_case])


def sample_jacobians(f: Callable[[Any], Any], z: Tensor) -> Tensor:
    """(B, D, D), each sample's own block of the dense Jacobian."""
    size = z[0].numel()
    full = jacobian(f, z).reshape(len(z), size, len(z), size)
    return torch.stack([full[b, :, b] for b in range(len(z))])


# Jacobian loss


@cases
def test_with_a_given_draw_the_jacobian_loss_is_its_formula(case):
    make, weight, x, z = case()
    f = make(weight, x)
    torch.manual_seed(1)
    estimate = jacobian_loss(f, z, samples=2)
    torch.manual_seed(1)
    products = sum(
        torch.einsum("bi,bij->bj", torch.randn(len(z), z[0].numel(), dtype=F64), j).square().sum()
        for j in [sample_jacobians(f, z)] * 2
    )
    torch.testing.assert_close(estimate, products / 2 / z.numel())


@cases
def test_over_a_complete_basis_the_jacobian_loss_is_the_frobenius_norm(case, monkeypatch):
    make, weight, x, z = case()
    f, size = make(weight, x), z[0].numel()
    # With ε running through √D eᵢ, i = 1 … D, the mean of ‖εᵀJ‖² is Σᵢ ‖eᵢᵀJ‖², nothing random.
    rows = iter(math.sqrt(size) * torch.eye(size, dtype=F64))
    monkeypatch.setattr(torch, "randn_like", lambda v: next(rows).expand_as(v))
    exact = sample_jacobians(f, z).square().sum() / z.numel()
    torch.testing.assert_close(jacobian_loss(f, z, samples=size), exact)


@cases
def test_the_jacobian_loss_estimates_the_frobenius_norm(case):
    make, weight, x, z = case()
    f, samples = make(weight, x), 4000
    j = sample_jacobians(f, z)
    exact = j.square().sum() / z.numel()
    # Var ‖εᵀJ‖² = 2 ‖J Jᵀ‖²_F for Gaussian ε, independent over samples and draws.
    error = (2 * (j @ j.mT).square().sum() / samples).sqrt() / z.numel()
    assert error < 0.02 * exact  # else the next line would be vacuous
    assert abs(jacobian_loss(f, z, samples=samples) - exact) < 5 * error


@cases
def test_the_double_backward_of_the_jacobian_loss_is_right(case):
    make, weight, x, z = case()

    def loss(weight, x, z):
        torch.manual_seed(1)  # the same draw at every point
        return jacobian_loss(make(weight, x), z)

    # Central differences over 1e-6 of a smooth function in float64: errors about 1e-9.
    inputs = (weight.requires_grad_(), x.requires_grad_(), z.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_the_jacobian_loss_through_an_equilibrium_is_right():
    make, weight, x, z = dense_case()
    weight = 0.3 * weight

    def loss(weight, x):
        found = fixed_point(
            make(weight, x),
            torch.zeros_like(z),
            solver=LimitedMemoryBroydenSolver(tol=1e-14, max_steps=100),
            adjoint=Implicit(solver=GMRES(tol=1e-13)),
        )
        torch.manual_seed(1)
        return jacobian_loss(make(weight, x), found.value)

    # The equilibrium is solved to about 1e-14: differences over 1e-6 are good to 1e-8.
    inputs = (weight.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_the_jacobian_loss_of_several_scales_counts_all_their_entries():
    z = (torch.randn(3, 2, dtype=F64), torch.randn(3, 4, dtype=F64))
    torch.manual_seed(1)
    estimate = jacobian_loss(lambda s: (2 * s[0], 3 * s[1]), z)
    torch.manual_seed(1)
    epsilon = torch.randn(3, 6, dtype=F64)
    factors = torch.tensor([2.0, 2.0, 3.0, 3.0, 3.0, 3.0], dtype=F64)
    torch.testing.assert_close(estimate, (factors * epsilon).square().mean())


def test_a_cell_that_ignores_its_state_has_no_jacobian_loss():
    assert jacobian_loss(constant, torch.ones(2, 3)) == 0
    x = torch.ones(2, 3, requires_grad=True)
    assert jacobian_loss(lambda z: 2 * x, torch.ones(2, 3)) == 0


def test_the_jacobian_loss_works_without_gradients_around_it():
    make, weight, x, z = dense_case()
    torch.manual_seed(1)
    wanted = jacobian_loss(make(weight, x), z)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(jacobian_loss(make(weight, x), z), wanted)


# Skip and residual loss


def unfinished_solution(adjoint: Any, weight: Tensor, x: Tensor) -> Solution:
    """Two steps only, so that a residual is left."""
    solver = Picard(tol=1e-12, max_steps=2)
    return fixed_point(dense_cell(weight, x), torch.zeros_like(x), solver=solver, adjoint=adjoint)


def test_the_skip_loss_is_the_mean_distance_of_every_scale():
    z0 = (torch.zeros(2, 3), torch.ones(2, 2))
    found = fixed_depth(lambda z: (z[0] + 2.0, z[1] - 0.5), z0, depth=1)
    assert skip_loss(found).item() == 2.5
    single = fixed_depth(shifted, torch.zeros(4, 2), depth=1)
    assert skip_loss(single).item() == 2.0


@each("adjoint", [Implicit(), JacobianFree(), Phantom()])
def test_the_residual_loss_is_the_norm_and_its_gradient_the_partial_derivative(adjoint):
    _, weight, x, _ = dense_case()
    weight = (0.3 * weight).requires_grad_()  # a contraction, so that the last iterate is the best
    found = unfinished_solution(adjoint, weight, x)
    loss = residual_loss(found)
    assert isinstance(found.value, Tensor)
    z_sol = (found.value - found.defect).detach()
    by_hand = (dense_cell(weight, x)(z_sol) - z_sol).norm(dim=1).mean()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(loss.detach(), found.residual.mean())
    assert loss > 1e-3
    (got,) = torch.autograd.grad(loss, weight)
    (wanted,) = torch.autograd.grad(by_hand, weight)
    torch.testing.assert_close(got, wanted)


def test_the_residual_loss_at_an_exact_equilibrium_has_a_finite_gradient():
    a = torch.tensor(0.0, requires_grad=True)
    residual_loss(fixed_point(lambda z: a * z, torch.zeros(2, 3))).backward()
    assert a.grad is not None
    assert a.grad.item() == 0.0


# Spectral radius


def linear_map(*blocks: Tensor) -> tuple[Callable[[Any], Any], Tensor, float]:
    """z ↦ A z with A similar to the blocks; also A, and the condition of the similarity."""
    middle = torch.block_diag(*blocks).to(F64)
    basis = torch.eye(len(middle), dtype=F64) + 0.3 * torch.randn(len(middle), len(middle)).to(F64)
    a = basis @ middle @ torch.linalg.inv(basis)
    return lambda z: z @ a.mT, a, torch.linalg.cond(basis).item()


def rotation(radius: float, angle: float) -> Tensor:
    c, s = radius * math.cos(angle), radius * math.sin(angle)
    return torch.tensor([[c, -s], [s, c]])


def test_the_spectral_radius_of_a_dominant_real_eigenvalue():
    f, a, _ = linear_map(torch.diag(torch.tensor([-0.9, 0.4, 0.3, -0.2, 0.1])))
    exact = torch.linalg.eigvals(a).abs().max()
    # After 30 iterations the others have died out as (0.4 / 0.9)³⁰ ≈ 1e-11.
    estimate = spectral_radius(f, torch.randn(3, 5, dtype=F64))
    torch.testing.assert_close(estimate, exact.expand(3), rtol=1e-8, atol=0)


@each("angle", [0.3, 1.0, math.pi / 2])
def test_the_spectral_radius_of_a_dominant_complex_pair(angle):
    f, a, condition = linear_map(rotation(1.2, angle), torch.diag(torch.tensor([0.4, 0.3, -0.2])))
    exact = torch.linalg.eigvals(a).abs().max().item()
    estimate = spectral_radius(f, torch.randn(3, 5, dtype=F64))
    # Over the 30 steps that are averaged the norm may swing by the condition of the eigenbasis.
    assert (torch.log(estimate / exact).abs() < math.log(condition) / 30).all()


def test_every_sample_has_a_spectral_radius_of_its_own():
    slopes = torch.tensor([0.2, 0.5, 2.0], dtype=F64)
    estimate = spectral_radius(lambda z: slopes[:, None] * z, torch.randn(3, 4, dtype=F64))
    torch.testing.assert_close(estimate, slopes)


def test_the_spectral_radius_works_without_gradients_and_for_a_constant_cell():
    with torch.no_grad():
        radius = spectral_radius(doubled, torch.ones(2, 3))
        assert spectral_radius(constant, torch.ones(2, 3)).tolist() == [0.0, 0.0]
    torch.testing.assert_close(radius, torch.full((2,), 2.0))
    assert not radius.requires_grad


@each("function", [spectral_radius, jacobian_loss])
def test_inference_mode_is_refused_and_not_answered_with_zero(function):
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        function(doubled, torch.ones(2, 3))


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="samples is 0, but must be at least 1"):
        jacobian_loss(doubled, torch.ones(2, 3), samples=0)
    with pytest.raises(ValueError, match="iterations is 0, but must be at least 1"):
        spectral_radius(doubled, torch.ones(2, 3), iterations=0)


# The correction


@each(
    "weights, expected",
    [("constant", [1, 1, 1]), ("linear", [0.25, 0.5, 0.75]), ("exponential", [0.125, 0.25, 0.5])],
)
def test_the_correction_is_the_weighted_sum_of_the_losses_of_the_states(weights, expected):
    solver = Picard(tol=1e-12, max_steps=50)
    solution = fixed_point(lambda z: z / 2 + 1, torch.zeros(2, 1), solver=solver, states=[1, 2, 3])
    values = [1.5, 1.75, 1.875]  # after these steps and one evaluation
    loss = correction_loss(Tensor.mean, solution, weights=weights, decay=0.5)
    assert loss == pytest.approx(sum(w * v for w, v in zip(expected, values, strict=True)))


def test_the_correction_trains_through_every_state():
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    solver = Picard(tol=1e-12, max_steps=50)
    start = torch.ones(1, 1, dtype=F64)
    solution = fixed_point(
        lambda z: a * z + 1, start, solver=solver, adjoint=JacobianFree(), states=[1, 2]
    )
    loss = correction_loss(Tensor.sum, solution, weights="constant")
    (got,) = torch.autograd.grad(loss, a)
    assert got == pytest.approx(1.5 + 1.75)  # ∂f/∂a is the state itself


@each(
    "options, message",
    [
        ({}, "no states on the way: give the layer states=3"),
        ({"weights": "cubic"}, "weights is 'cubic'.*constant, linear, exponential"),
        ({"decay": 0.0}, "decay 0.0, but must be.*above 0"),
    ],
)
def test_a_correction_of_no_states_or_other_weights_is_refused(options, message):
    solution = fixed_point(lambda z: z / 2, torch.ones(1, 1), states=2 if options else None)
    with pytest.raises(ValueError, match=message):
        correction_loss(Tensor.sum, solution, **options)
