"""Baselines in place of an equilibrium: unrolled networks; and equilibria side by side."""

import pytest
import torch
from torch import Tensor, nn

from fastdeq import DeepEquilibriumNetwork, DEQChain, SkipDeepEquilibriumNetwork, Status
from fastdeq.adjoints import Implicit
from fastdeq.krylov import GMRES
from fastdeq.nn import (
    DenseCell,
    MultiScaleResidualCell,
    MultiScaleResidualNetwork,
    SideBySideCell,
    UnrolledNetwork,
)
from tests.cells import EXACT, TIGHT, DenseTanh
from tests.loops import each

# Unrolled


def test_an_unrolled_network_repeats_its_cell_with_ordinary_gradients():
    cell, x = DenseTanh(4, 0.7), torch.randn(3, 4, dtype=torch.float64)
    y, solution = UnrolledNetwork(cell, steps=3)(x)
    z = torch.zeros_like(x)
    for _ in range(3):
        last, z = z, cell(z, x)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(solution.residual, (z - last).norm(dim=1))
    parameters = list(cell.parameters())
    got = torch.autograd.grad(y.square().sum(), parameters)
    for one, other in zip(got, torch.autograd.grad(z.square().sum(), parameters), strict=True):
        torch.testing.assert_close(one, other)
    assert (solution.nfe == 3).all()
    assert (solution.status == Status.NOT_SOLVED).all()


def test_the_depth_of_a_call_replaces_the_steps_for_that_call():
    layer, x = UnrolledNetwork(DenseCell(4), steps=3), torch.randn(3, 4)
    assert (layer(x, depth=2)[1].nfe == 2).all()
    assert (layer(x)[1].nfe == 3).all()


@each("steps", [0, -1, True, 2.0])
def test_steps_below_one_are_refused(steps):
    with pytest.raises(ValueError, match=r"steps is .* whole number of at least 1"):
        UnrolledNetwork(DenseCell(4), steps=steps)


def test_a_chain_takes_an_unrolled_network_for_its_equilibrium():
    layer = UnrolledNetwork(DenseCell(4), steps=2)
    chain = DEQChain(nn.Linear(3, 4), layer)
    assert chain.equilibrium is layer
    assert not chain.equilibrium.initializer.predicts
    assert (chain(torch.randn(3, 3))[1].nfe == 2).all()


def test_the_residual_network_makes_the_scales_of_the_cell_in_one_evaluation():
    sizes = ([3, 16, 16], [4, 8, 8])
    network = MultiScaleResidualNetwork(*sizes, expansion=2, downsample_times=1)
    cell = MultiScaleResidualCell(*sizes, expansion=2, downsample_times=1)
    x = torch.randn(2, 4, 8, 8)
    y, solution = UnrolledNetwork(network, steps=1)(x)
    assert [scale.shape[1:] for scale in y] == cell.scales
    assert (solution.nfe == 1).all()
    middle = network.blocks[1](network.downs[0](network.blocks[0](x)))
    torch.testing.assert_close(y[1], middle)


# Side by side


def test_equilibria_side_by_side_are_those_of_their_cells_alone():
    cells, x = [DenseTanh(4, 0.7), DenseTanh(3, 0.5)], torch.randn(5, 7, dtype=torch.float64)
    y, solution = DeepEquilibriumNetwork(
        SideBySideCell(cells, [4, 3]), solver=TIGHT, adjoint=EXACT
    )(x)
    parts = [
        DeepEquilibriumNetwork(cell, solver=TIGHT, adjoint=EXACT)(part)[0]
        for cell, part in zip(cells, x.split([4, 3], 1), strict=True)
    ]
    assert solution.converged.all()
    # Both solves are tight to 1e-12 relative.
    torch.testing.assert_close(y, torch.cat(parts, dim=1), rtol=1e-10, atol=1e-11)
    leaves = [parameter for cell in cells for parameter in cell.parameters()]
    w = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, w)
    wanted = torch.autograd.grad(torch.cat(parts, dim=1), leaves, w)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_equilibria_side_by_side_may_start_at_their_first_evaluation():
    cell, x = SideBySideCell([DenseCell(2), DenseCell(3)], [2, 3]), torch.randn(4, 5)
    layer = SkipDeepEquilibriumNetwork(cell)
    torch.testing.assert_close(layer.explicit(x), layer.cell(torch.zeros_like(x), x))
    assert DEQChain(layer).equilibrium is layer


def test_the_error_for_branches_of_another_width_than_the_input_names_both():
    layer = DeepEquilibriumNetwork(SideBySideCell([DenseCell(2), DenseCell(3)], [2, 3]))
    with pytest.raises(ValueError, match=r"input has 6 features, but the branches take \[2, 3\]"):
        layer(torch.randn(4, 6))


@each("count, widths", [(2, [2]), (0, []), (1, [2, 3])])
def test_a_width_is_needed_for_each_cell(count, widths):
    with pytest.raises(ValueError, match="give one each"):
        SideBySideCell([DenseCell(2)] * count, widths)


def test_a_coupled_branch_couples_the_whole():
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            h: Tensor = self.norm(0.1 * z + x)
            return h

    cells = [DenseCell(2), Normalized()]
    with pytest.raises(ValueError, match=r"BatchNorm1d 'cells\.1\.norm'"):
        DeepEquilibriumNetwork(SideBySideCell(cells, [2, 3]), adjoint=Implicit(solver=GMRES()))
