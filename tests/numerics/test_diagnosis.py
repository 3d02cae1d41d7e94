"""What is measured at an equilibrium, on maps whose answers are known."""

import pytest
import torch
from torch import Tensor

from fastdeq import DeepEquilibriumNetwork
from fastdeq.diagnosis import contraction, multi_start, spectral_radius
from fastdeq.flatten import Layout
from fastdeq.nn import DenseCell, TwoLayerCell, initialize
from fastdeq.solvers import Picard
from tests.loops import each
from tests.problems import problem_named

# The largest singular value of the Jacobian


@each("name", ["linear", "tanh", "two_scale", "non_contractive"])
def test_the_contraction_estimate_is_the_norm_of_each_samples_jacobian(name):
    problem = problem_named(name)
    size, batch = problem.exact.shape[1], len(problem.exact)
    blocks = problem.jacobian.view(batch, size, batch, size).diagonal(dim1=0, dim2=2)
    expected = torch.linalg.matrix_norm(blocks.permute(2, 0, 1), ord=2)
    z = Layout.of(problem.z0).unflatten(problem.exact)
    found = contraction(problem.f, z, iterations=400)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (contraction(problem.f, z, iterations=3) <= expected * (1 + 1e-9)).all()
    assert not found.requires_grad


def test_the_contraction_estimate_is_above_the_spectral_radius_of_a_shear():
    shear = torch.tensor([[0.5, 3.0], [0.0, 0.5]], dtype=torch.float64)
    z = torch.ones(1, 2, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return z @ shear.mT

    norm = torch.linalg.matrix_norm(shear, ord=2)
    torch.testing.assert_close(contraction(f, z)[0], norm, rtol=1e-6, atol=0)
    assert float(spectral_radius(f, z, iterations=4000)) == pytest.approx(0.5, rel=1e-2)


# The certificate


def clipped(cell: DenseCell | TwoLayerCell) -> list[Tensor]:
    layers = [cell.state] if isinstance(cell, DenseCell) else [cell.state, cell.output]
    return [layer.weight.detach() for layer in layers]


CELLS = [lambda **o: DenseCell(6, **o), lambda **o: TwoLayerCell(6, 9, activation="tanh", **o)]


@each("cell", CELLS)
@each("lipschitz", [0.3, 0.95])
def test_the_error_bound_holds_and_the_weights_stay_within_their_norm(cell, lipschitz):
    made = cell(lipschitz=lipschitz).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "original" in name:
                p.mul_(10)  # far above the bound
    norms = [torch.linalg.matrix_norm(w, ord=2) for w in clipped(made)]
    assert float(torch.stack(norms).prod()) == pytest.approx(lipschitz, rel=1e-9)
    x = torch.randn(40, 6, dtype=torch.float64)
    exact, _ = DeepEquilibriumNetwork(made, solver=Picard(tol=1e-14, max_steps=2000))(x)
    for tol in (0.3, 1e-2, 1e-5):
        z, solution = DeepEquilibriumNetwork(made, solver=Picard(tol=tol, max_steps=2000))(x)
        error = (z - exact).norm(dim=1)
        assert solution.error_bound is not None
        expected = solution.residual / (1 - lipschitz)
        torch.testing.assert_close(solution.error_bound, expected)
        assert (error <= solution.error_bound * (1 + 1e-9) + 1e-12).all()


def test_a_weight_below_its_bound_is_left_as_it_is_and_both_get_gradients():
    cell = DenseCell(4, lipschitz=0.9)
    initialize(cell, "normal")
    original = cell.get_parameter("state.parametrizations.weight.original")
    assert torch.equal(cell.state.weight, original)
    for factor in (1.0, 1000.0):
        with torch.no_grad():
            original.mul_(factor)
        cell.zero_grad()
        DeepEquilibriumNetwork(cell)(torch.randn(3, 4))[0].sum().backward()
        assert original.grad is not None
        assert torch.isfinite(original.grad).all()


def test_without_a_bound_there_is_no_certificate():
    x = torch.randn(3, 4)
    assert DeepEquilibriumNetwork(DenseCell(4))(x)[1].error_bound is None
    layer = DeepEquilibriumNetwork(DenseCell(4, lipschitz=0.5), precision="bf16")
    assert layer(x)[1].error_bound is None


@each("cell", CELLS)
def test_a_bound_of_one_or_more_is_refused(cell):
    with pytest.raises(ValueError, match=r"lipschitz is 1\.0, but must be below 1"):
        cell(lipschitz=1.0)
    with pytest.raises(ValueError, match="lipschitz is 0, but must be finite and above 0"):
        cell(lipschitz=0)


# Several equilibria


def test_a_sample_with_several_equilibria_is_found_and_one_with_a_single_one_is_not():
    # z = tanh(2 z + x): three equilibria for small x, one beyond |x| = √2 − artanh(1/√2) = 0.53
    x = torch.tensor([[0.0], [0.2], [0.4], [0.8], [3.0]], dtype=torch.float64)
    z0 = torch.full_like(x, 0.1)
    found = multi_start(lambda z: torch.tanh(2 * z + x), z0, starts=16, std=2.0)
    assert found.several.tolist() == [True, True, True, False, False]
    assert (found.converged >= 8).all()
    assert (found.distance[3:] <= 1e-4).all()
    # Of x = 0: ±0.9575, at a distance of two of their norms
    assert float(found.distance[0]) == pytest.approx(2.0, rel=1e-3)


@each("name", ["linear", "tanh", "two_scale"])
def test_a_contraction_has_one_equilibrium(name):
    problem = problem_named(name)
    found = multi_start(problem.f, problem.z0, starts=4)
    assert not found.several.any()
    assert (found.converged == 4).all()


def test_starts_that_do_not_converge_are_not_compared():
    x = torch.ones(2, 3)
    found = multi_start(lambda z: z + x, x, starts=3, solver=Picard(max_steps=5))
    assert found.converged.tolist() == [0, 0]
    assert not found.several.any()
    assert found.distance.tolist() == [0, 0]


def test_wrong_settings_are_refused_by_name():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="starts is 1, but must be finite and at least 2"):
        multi_start(lambda z: 0.5 * z, x, starts=1)
    with pytest.raises(ValueError, match="iterations is 0"):
        contraction(lambda z: 0.5 * z, x, iterations=0)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        contraction(lambda z: 0.5 * z, x)
