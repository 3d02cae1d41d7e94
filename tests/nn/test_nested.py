"""An equilibrium layer in the cell of another one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdeq import DeepEquilibriumNetwork
from fastdeq.adjoints import AbstractAdjoint, Phantom, Unrolled
from fastdeq.nn import VariationalDropout
from fastdeq.solvers import Picard
from tests.cells import EXACT, TIGHT, DenseTanh
from tests.loops import each

WIDTH = 3


class Nested(nn.Module):
    """f(z, x) = y*(z + x) / 2 + x with the equilibrium y* of an inner cell."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.inner(z + x)[0]
        return y / 2 + x


def layers(adjoint: AbstractAdjoint, extra: nn.Module | None = None) -> DeepEquilibriumNetwork:
    inner = DeepEquilibriumNetwork(DenseTanh(WIDTH, 0.5, extra), solver=TIGHT, adjoint=adjoint)
    return DeepEquilibriumNetwork(Nested(inner), solver=TIGHT, adjoint=adjoint)


def inputs() -> Tensor:
    return torch.randn(4, WIDTH, dtype=torch.float64)


def test_nested_equilibria_have_the_gradient_of_both_unrolled():
    layer, x = layers(EXACT), inputs()
    inner: Any = layer.cell.inner
    slow = Picard(tol=1e-13, max_steps=200)
    leaves = list(layer.parameters())
    z, solution = layer(x)
    assert solution.converged.all()
    got = torch.autograd.grad(z.square().sum(), leaves)
    for each_layer in (layer, inner):
        each_layer.adjoint, each_layer.solver = Unrolled(), slow
    unrolled, _ = layer(x)
    torch.testing.assert_close(z, unrolled, rtol=1e-10, atol=1e-10)
    for a, b in zip(got, torch.autograd.grad(unrolled.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@each("adjoint", [EXACT, Phantom(steps=2)])
def test_dropout_in_the_inner_cell_is_drawn_once_per_outer_call(adjoint):
    dropout = VariationalDropout(0.5)
    layer, x = layers(adjoint, dropout), inputs()
    masks: list[Tensor] = []
    dropout.register_forward_hook(lambda _, given, out: masks.append((out / given[0]).detach()))
    z, solution = layer(x)
    z.sum().backward()
    assert solution.converged.all()
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    first = masks[0]
    masks.clear()
    torch.manual_seed(5)
    layer(x)
    assert not torch.equal(masks[0], first)


class Pair(Nested):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        pair: Tensor = self.inner(z + x)
        return pair


def test_a_layer_as_the_cell_or_as_its_result_is_refused_with_the_cure():
    inner = DeepEquilibriumNetwork(DenseTanh(WIDTH, 0.5), solver=TIGHT)
    with pytest.raises(TypeError, match=r"returns \(z, solution\).*self\.inner\(z \+ x\)\[0\]"):
        DeepEquilibriumNetwork(inner)
    with pytest.raises(TypeError, match=r"f\(z\) must be a tensor.*tuple with Solution"):
        DeepEquilibriumNetwork(Pair(inner))(inputs())
