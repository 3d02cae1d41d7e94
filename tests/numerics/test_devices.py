"""Solve, differentiate and train a layer on each kind of device; the tests also run
on the CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastdeq import (
    DEQChain,
    MultiScaleSkipDeepEquilibriumNetwork,
    SkipDeepEquilibriumNetwork,
    fixed_point,
)
from fastdeq.adjoints import Implicit
from fastdeq.nn import (
    DenseCell,
    MultiScaleExplicitNetwork,
    MultiScaleHead,
    MultiScaleResidualCell,
    MultiScaleStem,
)
from fastdeq.regularizers import jacobian_loss, skip_loss, spectral_radius
from fastdeq.solvers import LimitedMemoryBroydenSolver
from tests.loops import each
from tests.problems import SOLVERS

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
)


def tanh_cell(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.tanh(z @ weight + bias)


@every_device
@pytest.mark.parametrize("name", SOLVERS)
def test_value_and_gradient_are_those_of_the_cpu_in_float64(name, device):
    weight, x = 0.3 * torch.randn(6, 6) / 6**0.5, torch.randn(4, 6)
    found = []
    for place, dtype, solver in (
        ("cpu", torch.float64, LimitedMemoryBroydenSolver(tol=1e-12)),
        (device, torch.float32, SOLVERS[name](tol=1e-5, max_steps=500, check_every=3)),
    ):
        w = weight.to(place, dtype).requires_grad_()
        bias = x.to(place, dtype)
        start = torch.zeros_like(bias)
        solution = fixed_point(tanh_cell(w, bias), start, solver=solver)
        assert isinstance(solution.value, Tensor)
        assert solution.value.device.type == place
        assert solution.converged.all()
        (gradient,) = torch.autograd.grad(solution.value.square().sum(), w)
        found.append((solution.value.detach().cpu().double(), gradient.cpu().double()))
    for expected, got in zip(*found, strict=True):
        # The solve's 1e-5 and the default adjoint's 1e-4, relative, over a contraction of about
        # 0.3.
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@every_device
@each("backward", ["lbroyden", "anderson", "picard"])
def test_a_layer_trains_for_a_step_with_all_regularizers(backward, device):
    adjoint = Implicit(solver=SOLVERS[backward](tol=1e-4))
    deq = SkipDeepEquilibriumNetwork(DenseCell(8), nn.Linear(8, 8), adjoint=adjoint)
    model = DEQChain(nn.Linear(5, 8), deq, nn.Linear(8, 3)).to(device)
    x = torch.randn(6, 5, device=device)
    logits, solution = model(x, jacobian_loss=True)
    loss = logits.square().mean() + skip_loss(solution) + solution.jacobian_loss
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@every_device
@each("normalization", ["batch", "group"])
def test_a_multiscale_network_trains_for_a_step(normalization, device):
    channels = [4, 8]
    cell = MultiScaleResidualCell(
        [3, 8, 8], channels, expansion=2, normalization=normalization, weight_norm=True, dropout=0.2
    )
    explicit = MultiScaleExplicitNetwork(channels, normalization=normalization, weight_norm=True)
    model = DEQChain(
        MultiScaleStem(3, channels),
        MultiScaleSkipDeepEquilibriumNetwork(cell, explicit),
        MultiScaleHead(channels, [2, 4], 8, 5),
    ).to(device)
    logits, solution = model(torch.randn(6, 3, 8, 8, device=device), jacobian_loss=True)
    loss = logits.square().mean() + skip_loss(solution) + solution.jacobian_loss
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@every_device
def test_the_jacobian_loss_and_the_spectral_radius_are_computed_on_the_device(device):
    z = torch.ones(3, 4, device=device)
    assert spectral_radius(lambda z: 0.5 * z, z).tolist() == pytest.approx([0.5] * 3)
    assert jacobian_loss(lambda z: 0.5 * z, z).device.type == device
