"""The neural ODE against equations whose solution is known, and its statistics."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdeq import DEQChain, Status
from fastdeq.nn import (
    DenseCell,
    ExplicitNetwork,
    MultiScaleResidualCell,
    VariationalDropout,
    weight_norm,
)
from tests.cells import DenseTanh
from tests.loops import each
from tests.nn.layers import recorded_masks
from tests.nn.scales import WIDTHS, dense_cell
from tests.training.tasks import CLASSES, FEATURES, make_task, samples, train_metrics

pytest.importorskip("torchdiffeq")

from fastdeq.nn.neural_ode import NeuralODE


class Linear(nn.Module):
    """f(z, x) = A z + x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(width, width, dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.a.mT + x


def exact(a: Tensor, x: Tensor) -> Tensor:
    """f(z(1)) of dz/dt = A z + x, z(0) = 0: z(1) = ∫ exp(A s) ds x, from one matrix exponential."""
    n = len(a)
    zero = torch.zeros(n, n, dtype=a.dtype)
    whole = torch.linalg.matrix_exp(
        torch.cat([torch.cat([a, torch.eye(n, dtype=a.dtype)], 1), torch.cat([zero, zero], 1)])
    )
    z1: Tensor = x @ whole[:n, n:].mT
    return z1 @ a.mT + x


@each("method", ["dopri5", "bosh3", "dopri8", "adaptive_heun"])
def test_value_and_gradients_are_those_of_the_known_solution(method):
    cell, x = Linear(3), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    tol = 1e-6 if method in ("bosh3", "adaptive_heun") else 1e-10
    y, _ = NeuralODE(cell, method=method, tol=tol, max_steps=100_000)(x)
    wanted = exact(cell.a, x)
    # tol bounds the error of a step, not that of the whole: hence two digits more.
    close: dict[str, Any] = {"rtol": 100 * tol, "atol": 100 * tol}
    torch.testing.assert_close(y, wanted, **close)
    w = torch.randn_like(y)
    got = torch.autograd.grad(y, (cell.a, x), w)
    for one, other in zip(got, torch.autograd.grad(wanted, (cell.a, x), w), strict=True):
        torch.testing.assert_close(one, other, **close)


def test_the_gradient_reaches_what_made_the_input():
    stem, x = nn.Linear(3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    cell = Linear(3)
    y, _ = DEQChain(stem, NeuralODE(cell, tol=1e-9))(x)
    w = torch.randn_like(y)
    got = torch.autograd.grad(y, list(stem.parameters()), w)
    wanted = torch.autograd.grad(exact(cell.a, stem(x)), list(stem.parameters()), w)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def test_nfe_is_the_number_of_calls_of_the_cell_and_nothing_was_solved():
    cell, x = DenseTanh(4, 0.7), torch.randn(3, 4, dtype=torch.float64)
    y, solution = NeuralODE(cell, tol=1e-4)(x)
    assert (solution.nfe == cell.calls).all()
    assert (solution.steps > 0).all()
    assert (solution.steps < solution.nfe).all()
    assert (solution.status == Status.NOT_SOLVED).all()
    torch.testing.assert_close(solution.residual, solution.defect.norm(dim=1))
    torch.testing.assert_close(cell(y - solution.defect, x), y)


@each("z0_learns", [False, True])
def test_the_backward_pass_reports_the_calls_of_the_cell_that_it_makes(z0_learns):
    cell, x = DenseTanh(4, 0.7), torch.randn(3, 4, dtype=torch.float64)
    explicit = ExplicitNetwork(nn.Linear(4, 4, dtype=torch.float64)) if z0_learns else None
    y, solution = NeuralODE(cell, tol=1e-4, initializer=explicit)(x)
    assert solution.backward.stats is None
    forward, cell.calls = cell.calls, 0
    y.sum().backward()
    stats = solution.backward.stats
    assert stats is not None
    assert stats.nfe.tolist() == [cell.calls] * 3
    # dopri5: two evaluations to start with, six per step
    assert stats.nfe.tolist() == (2 + 6 * stats.steps).tolist()
    assert (stats.status == Status.NOT_SOLVED).all()
    assert stats.residual.isnan().all()
    assert (solution.nfe == forward).all()  # as it was
    assert stats.seconds > 0


def test_a_second_backward_pass_reports_itself():
    cell, x = DenseTanh(4, 0.7), torch.randn(3, 4, dtype=torch.float64)
    y, solution = NeuralODE(cell, tol=1e-4)(x)
    for _ in range(2):
        cell.calls = 0
        y.sum().backward(retain_graph=True)
        stats = solution.backward.stats
        assert stats is not None
        assert stats.nfe.tolist() == [cell.calls] * 3


def test_without_a_backward_pass_nothing_is_reported_and_the_solution_is_freed():
    layer, x = NeuralODE(DenseCell(4)), torch.randn(3, 4)
    with torch.no_grad():
        assert layer(x)[1].backward.stats is None
    gc.disable()  # what dies without the collector is in no cycle
    try:
        y, solution = layer(x)
        state = weakref.ref(solution.defect)
        del y, solution
        assert state() is None
    finally:
        gc.enable()


def test_both_integrations_take_time():
    y, solution = NeuralODE(DenseCell(4))(torch.randn(3, 4))
    assert solution.seconds > 0
    y.sum().backward()
    assert solution.backward.stats is not None
    assert solution.backward.stats.seconds > 0


def test_a_training_step_logs_evaluations_and_seconds_of_the_backward_pass(tmp_path):
    model = DEQChain(nn.Linear(FEATURES, 4), NeuralODE(DenseCell(4)), nn.Linear(4, CLASSES))
    task = make_task(model=model)
    metrics = train_metrics(task, [samples(5)], tmp_path)
    assert metrics["nfe_backward"] >= 8
    assert metrics["backward_seconds"] > 0
    assert metrics["solve_seconds"] > 0
    assert not {"residual_backward", "unconverged_backward"} & metrics.keys()


def test_a_tighter_tolerance_takes_more_evaluations():
    cell, x = DenseTanh(4, 0.7), torch.randn(3, 4, dtype=torch.float64)
    loose, tight = (NeuralODE(cell, tol=tol)(x)[1].nfe[0] for tol in (1e-2, 1e-8))
    assert loose < tight


def test_several_scales_are_integrated_together():
    cell, x = dense_cell(), torch.randn(5, 4)
    y, solution = NeuralODE(cell)(x)
    assert [scale.shape for scale in y] == [(5, width) for width in WIDTHS]
    assert solution.defect.shape == (5, sum(WIDTHS))
    sum(scale.sum() for scale in y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cell.parameters())


def test_backward_sees_the_masks_of_the_call():
    dropout, x = VariationalDropout(0.5), torch.randn(3, 4, dtype=torch.float64)
    masks = recorded_masks(dropout)
    y, solution = NeuralODE(DenseTanh(4, 0.4, dropout))(x)
    y.sum().backward()
    assert len(masks) > solution.nfe[0]  # the backward pass's too
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_weight_norm_in_the_cell_gets_its_gradients():
    cell, x = DenseTanh(4, 0.7), torch.randn(3, 4, dtype=torch.float64)
    y, _ = NeuralODE(cell, tol=1e-8)(x)
    (wanted,) = torch.autograd.grad(y.sum(), cell.injection.weight)
    weight_norm(cell)
    NeuralODE(cell, tol=1e-8)(x)[0].sum().backward()
    magnitude = dict(cell.named_parameters())["injection.parametrizations.weight.original0"]
    unit = cell.injection.weight.detach() / magnitude.detach()
    # g scales its row of the weight: dL/dg is the row's gradient along the row's direction.
    torch.testing.assert_close(
        magnitude.grad, (wanted * unit).sum(dim=1, keepdim=True), rtol=1e-5, atol=1e-6
    )


def test_pretraining_unrolls_the_cell_instead():
    layer = NeuralODE(DenseCell(4))
    assert (layer(torch.randn(3, 4), depth=2)[1].nfe == 2).all()


def test_without_gradients_the_value_is_the_same():
    layer = NeuralODE(MultiScaleResidualCell([1, 4, 4], [2, 4], expansion=2))
    x = torch.randn(3, 2, 4, 4)
    y, _ = layer(x)
    with torch.no_grad():
        quiet, _ = layer(x)
    for one, other in zip(y, quiet, strict=True):
        assert torch.equal(one, other)
        assert not other.requires_grad


def test_giving_up_says_what_to_change():
    class Steep(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.sin(1e4 * (z + x))

    with pytest.raises(RuntimeError, match=r"max_num_steps.*raise tol or max_steps"):
        NeuralODE(Steep(), tol=1e-6, max_steps=3)(torch.randn(3, 4))


@each(
    "options, cure",
    [
        ({"method": "euler"}, "'euler', but must be one of dopri5"),
        ({"tol": 0.0}, "must be above 0"),
        ({"max_steps": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, cure):
    with pytest.raises(ValueError, match=cure):
        NeuralODE(DenseCell(4), **options)
