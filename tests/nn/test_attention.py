"""Cells with attention: double backward and forward mode, which PyTorch's fused kernels do not
have (pytorch issue 116350)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastdeq import DeepEquilibriumNetwork, fixed_point
from fastdeq.adjoints import Implicit
from fastdeq.autodiff import jvp, unfused_attention
from fastdeq.krylov import GMRES
from fastdeq.regularizers import jacobian_loss
from fastdeq.solvers import LimitedMemoryBroydenSolver, NewtonKrylov
from tests.loops import each
from tests.problems import dense_jacobian

F64 = torch.float64
WIDTH, TOKENS = 4, 3


class Plain(nn.Module):
    """Softmax attention by PyTorch's function, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = self.project(z)[:, None].chunk(3, dim=-1)  # with an axis of heads, as fused
        return scaled_dot_product_attention(q, k, v)[:, 0]


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, z: Tensor) -> Tensor:
        y: Tensor = self.attend(z, z, z, need_weights=self.need_weights)[0]
        return y


class Cell(nn.Module):
    """f(z, x) = 0.3 · block(z) + x."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y: Tensor = 0.3 * self.block(z) + x
        return y


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "function": Plain,
    "multi-head": lambda: SelfAttention(need_weights=False),
    "multi-head with weights": lambda: SelfAttention(need_weights=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(
        WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True
    ),
}
everywhere = [
    each("training", [True, False]),
    each("block", BLOCKS),
]


def on_every_block(test: Any) -> Any:
    for mark in everywhere:
        test = mark(test)
    return test


def make(block: str, training: bool) -> tuple[Cell, Tensor]:
    torch.manual_seed(3)
    cell = Cell(BLOCKS[block]()).double().train(training)
    return cell, torch.randn(2, TOKENS, WIDTH, dtype=F64)


@on_every_block
def test_the_gradient_of_the_jacobian_loss_equals_finite_differences(block, training):
    cell, x = make(block, training)
    z, direction = torch.randn_like(x), torch.randn_like(x)

    def loss(at: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same ε every time
        return jacobian_loss(lambda z: cell(z, x), at)

    (gradient,) = torch.autograd.grad(loss(z.requires_grad_()), z)
    h = 1e-5
    with torch.no_grad():
        difference = (loss(z + h * direction) - loss(z - h * direction)) / (2 * h)
    # Truncation h² = 1e-10, rounding 1e-16 / h = 1e-11.
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-9)


@on_every_block
def test_a_layer_is_trained_with_the_jacobian_loss(block, training):
    cell, x = make(block, training)
    z, solution = DeepEquilibriumNetwork(cell)(x, jacobian_loss=True)
    (z.square().mean() + solution.jacobian_loss).backward()
    gradients = [p.grad for p in cell.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


@on_every_block
@each("frozen", [True, False])
def test_products_in_forward_mode_are_those_of_the_dense_jacobian(block, training, frozen):
    cell, x = make(block, training)
    cell.requires_grad_(not frozen)

    def f(z: Tensor) -> Tensor:
        y: Tensor = cell(z.view_as(x), x).flatten(1)
        return y

    z, v = (torch.randn(len(x), TOKENS * WIDTH, dtype=F64) for _ in range(2))
    with torch.no_grad(), unfused_attention():
        product = jvp(f, z, v)
    torch.testing.assert_close(product.flatten(), dense_jacobian(f, z) @ v.flatten())


@on_every_block
@each("grad", [True, False])
def test_newton_krylov_finds_the_equilibrium(block, training, grad):
    cell, x = make(block, training)
    adjoint = Implicit(solver=GMRES(tol=1e-10))
    with torch.set_grad_enabled(grad):
        found, expected = (
            fixed_point(lambda z: cell(z, x), torch.zeros_like(x), solver=solver, adjoint=adjoint)
            for solver in (
                NewtonKrylov(tol=1e-10),
                LimitedMemoryBroydenSolver(tol=1e-10, max_steps=100),
            )
        )
    assert found.converged.all()
    assert expected.converged.all()
    torch.testing.assert_close(found.value, expected.value, rtol=1e-7, atol=1e-8)


def test_the_choice_of_kernels_is_what_it_was_afterwards_and_after_an_error():
    def state() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        return (
            torch.backends.mha.get_fastpath_enabled(),
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
        )

    def fail(z: Any) -> Any:
        assert state() == (False, False, False, True)
        raise ZeroDivisionError

    before = state()
    with pytest.raises(ZeroDivisionError):
        jacobian_loss(fail, torch.zeros(2, 3))
    assert state() == before


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 0.5 * z + 1

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return 0.5 * cotangents[0]


def test_newton_krylov_on_an_operation_without_forward_mode_says_so():
    with pytest.raises(NotImplementedError, match="use another solver than NewtonKrylov"):
        fixed_point(_NoForwardMode.apply, torch.zeros(2, 3), solver=NewtonKrylov())
