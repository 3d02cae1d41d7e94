"""The equilibrium layers: results, counts and gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastdeq import DeepEquilibriumNetwork, SkipDeepEquilibriumNetwork, Status
from fastdeq.nn import Zeros
from fastdeq.regularizers import jacobian_loss, skip_loss
from fastdeq.solvers import (
    Anderson,
    BroydenSolver,
    ContinuousSolver,
    LimitedMemoryBroydenSolver,
    NewtonKrylov,
    Picard,
)
from tests.cells import EXACT, TIGHT
from tests.loops import each
from tests.nn.layers import WIDTH, Dense, build, dense_input, every_start, grad


class Conv(nn.Module):
    """f(z, x) = tanh(K * z + x) on 2 channels; |K| is small enough for a contraction."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
        with torch.no_grad():
            self.kernel.weight.mul_(0.4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.kernel(z) + x)


class TwoScales(nn.Module):
    """A state of two scales, (B, 4) and (B, 2, 3), that feed each other."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 6, dtype=torch.float64)
        self.down = nn.Linear(6, WIDTH, dtype=torch.float64)

    def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        coarse, fine = z
        return (
            torch.tanh(0.5 * self.down(fine.flatten(1)) + x),
            torch.tanh(0.5 * self.up(coarse)).unflatten(1, (2, 3)),
        )


def conv_input(batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, 4, 4, dtype=torch.float64)


# What a call returns


@each("cell, x", [(Dense, dense_input), (Conv, conv_input)])
def test_the_output_is_an_equilibrium_of_the_cell(cell, x):
    f, x = cell(), x()
    y, _ = DeepEquilibriumNetwork(f, solver=TIGHT)(x)
    # f contracts, so one more evaluation leaves less than the relative tolerance 1e-12.
    assert torch.linalg.vector_norm(f(y, x) - y) < 1e-11 * torch.linalg.vector_norm(y)


@every_start
def test_the_solution_has_the_statistics_of_the_returned_state(start):
    layer, x = build(start, Dense(), solver=Picard(tol=1e-3)), dense_input()
    y, solution = layer(x)
    z_sol = y - solution.defect
    assert solution.value is y
    assert solution.z0.shape == x.shape
    torch.testing.assert_close(solution.residual, (layer.cell(z_sol, x) - z_sol).norm(dim=1))
    torch.testing.assert_close(solution.relative_residual, solution.residual / y.norm(dim=1))
    assert solution.converged.all()
    assert (solution.relative_residual <= 1e-3).all()
    assert (solution.status == Status.CONVERGED).all()
    assert solution.steps.shape == solution.nfe.shape == (len(x),)


def test_the_jacobian_loss_comes_on_request_and_is_that_at_the_equilibrium():
    cell, x = Dense(), dense_input()
    layer = DeepEquilibriumNetwork(cell)
    assert layer(x)[1].jacobian_loss is None
    torch.manual_seed(1)
    y, solution = layer(x, jacobian_loss=True)
    torch.manual_seed(1)
    assert solution.jacobian_loss == jacobian_loss(lambda z: cell(z, x), y)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of NewtonKrylov's jvp
@each(
    "solver",
    [
        Picard(),
        Anderson(),
        BroydenSolver(),
        LimitedMemoryBroydenSolver(),
        NewtonKrylov(),
        ContinuousSolver(method="tsit5"),
        ContinuousSolver(method="bs3"),
        ContinuousSolver(method="vcab3"),
    ],
)
@every_start
def test_nfe_is_the_number_of_calls_of_the_cell(start, solver):
    cell = Dense()
    _, solution = build(start, cell, solver=solver)(dense_input(1))
    # The prediction of Skip Reg. is made before the solve and not counted in it, as documented.
    assert cell.calls == solution.nfe.item() + (start == "skip_reg")


@every_start
def test_the_cell_is_called_as_often_as_the_slowest_sample_needs(start):
    cell = Dense()
    x = dense_input(4) * torch.tensor([[9.0], [1.0], [0.1], [3.0]])  # saturated ones are easy
    _, solution = build(start, cell, solver=Picard(tol=1e-6))(x)
    assert solution.nfe.min() < solution.nfe.max()
    assert cell.calls == solution.nfe.max() + (start == "skip_reg")


def test_a_perfect_prediction_leaves_one_evaluation_and_the_closing_one():
    cell, x = Dense(), dense_input()
    y, solution = DeepEquilibriumNetwork(cell, solver=TIGHT)(x)
    prediction: Tensor = y.detach()

    class Oracle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return prediction

    _, predicted = SkipDeepEquilibriumNetwork(cell, Oracle(), solver=TIGHT)(x)
    assert (solution.nfe > 2).all()
    assert (predicted.nfe == 2).all()


def test_a_state_of_another_shape_than_the_input():
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.injection = nn.Linear(WIDTH, 10)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            h: Tensor = self.injection(x)
            return torch.tanh(0.5 * z.roll(1, 2) + h.unflatten(1, (2, 5)))

    x = torch.randn(3, WIDTH)
    for layer in (
        DeepEquilibriumNetwork(Wider(), initializer=Zeros([2, 5])),
        SkipDeepEquilibriumNetwork(Wider(), zeros=Zeros([2, 5])),
    ):
        y, solution = layer(x)
        assert y.shape == solution.z0.shape == (3, 2, 5)
        assert solution.converged.all()


def test_whole_numbers_may_be_the_input_where_the_cell_embeds_them():
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, WIDTH)

        def forward(self, z: Tensor, tokens: Tensor) -> Tensor:
            h: Tensor = self.table(tokens)
            return torch.tanh(0.5 * z.roll(1, 2) + h)

    tokens = torch.randint(10, (3, 7))
    y, solution = DeepEquilibriumNetwork(Embedding(), initializer=Zeros([7, WIDTH]))(tokens)
    assert y.shape == (3, 7, WIDTH)
    assert solution.converged.all()


def test_a_state_of_several_scales():
    cell, x = TwoScales(), dense_input()
    y, solution = DeepEquilibriumNetwork(
        cell, initializer=Zeros([[WIDTH], [2, 3]]), solver=TIGHT, adjoint=EXACT
    )(x)
    assert isinstance(y, tuple)
    for scale, again in zip(y, cell(y, x), strict=True):
        torch.testing.assert_close(scale, again)
    assert solution.defect.shape == (3, WIDTH + 6)
    sum(scale.square().sum() for scale in y).backward()
    assert all(grad(p).abs().sum() > 0 for p in cell.parameters())


# Gradients


@pytest.mark.parametrize(
    ("cell", "x"),
    [(Dense, dense_input), pytest.param(Conv, conv_input, marks=pytest.mark.slow)],
)
def test_the_gradients_of_the_layer_are_those_of_finite_differences(cell, x):
    layer = DeepEquilibriumNetwork(
        cell(), solver=LimitedMemoryBroydenSolver(tol=1e-14, max_steps=100), adjoint=EXACT
    )
    parameters = dict(layer.named_parameters())

    def output(x, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))[0]

    # The solve is exact to about 1e-14, so differences over 1e-6 are exact to about 1e-8.
    assert torch.autograd.gradcheck(
        output, (x(2).requires_grad_(), *parameters.values()), eps=1e-6, atol=1e-6, rtol=1e-5
    )


def test_the_skip_loss_trains_the_prediction_and_the_equilibrium():
    cell, network, x = Dense(), nn.Linear(WIDTH, WIDTH, dtype=torch.float64), dense_input()
    layer = SkipDeepEquilibriumNetwork(cell, network, solver=TIGHT, adjoint=EXACT)
    y, solution = layer(x)
    skip_loss(solution).backward()
    by_hand = torch.sign(solution.z0 - y).detach().mT @ x / y.numel()
    torch.testing.assert_close(grad(network.weight), by_hand)
    got = grad(cell.state.weight)
    layer.zero_grad()
    y, solution = layer(x)
    (solution.z0.detach() - y).abs().mean().backward()
    torch.testing.assert_close(got, grad(cell.state.weight))


def test_without_a_skip_loss_the_prediction_gets_no_gradient():
    layer = build("explicit", Dense())
    layer(dense_input())[0].sum().backward()
    assert all(p.grad is None for p in layer.initializer.parameters())
    assert all(p.grad is not None for p in layer.cell.parameters())
