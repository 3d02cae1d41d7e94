"""A call that starts at a given state, and one that returns states on the way."""

import pytest
import torch
from torch import nn

from fastdeq import DeepEquilibriumNetwork, DEQChain, fixed_point
from fastdeq.adjoints import Unrolled
from fastdeq.nn import UnrolledNetwork
from fastdeq.regularizers import skip_loss
from fastdeq.solvers import Picard
from tests.cells import EXACT, TIGHT
from tests.loops import each
from tests.nn.layers import WIDTH, Dense, build, dense_input, every_start


@every_start
def test_a_call_from_the_last_equilibrium_ends_there_with_fewer_evaluations(start):
    layer, x = build(start, Dense(), solver=TIGHT, adjoint=EXACT), dense_input()
    z, cold = layer(x)
    warm_z, warm = layer(x, z0=z.detach())
    torch.testing.assert_close(warm_z, z, rtol=1e-10, atol=1e-10)
    assert (warm.nfe < cold.nfe).all()
    assert torch.equal(warm.z0, z)


def test_the_gradient_of_an_equilibrium_does_not_depend_on_its_start():
    layer, x = DeepEquilibriumNetwork(Dense(), solver=TIGHT, adjoint=EXACT), dense_input()
    leaves = list(layer.parameters())
    cold, warm = (
        torch.autograd.grad(layer(x, z0=z0)[0].square().sum(), leaves)
        for z0 in (None, torch.randn_like(x))
    )
    for a, b in zip(cold, warm, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradients_reach_a_given_start_through_unrolled_steps_and_the_skip_loss():
    x, z0 = dense_input(), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    few = Picard(tol=1e-12, max_steps=3)
    unrolled = DeepEquilibriumNetwork(Dense(), solver=few, adjoint=Unrolled())
    z, _ = unrolled(x, z0=z0)
    z3, _ = unrolled(x, z0=z0, depth=4)
    got, expected = (torch.autograd.grad(each.sum(), z0)[0] for each in (z, z3))
    torch.testing.assert_close(got, expected)
    assert got.abs().min() > 0

    implicit = DeepEquilibriumNetwork(Dense(), solver=TIGHT, adjoint=EXACT)
    z, solution = implicit(x, z0=z0)
    (skip,) = torch.autograd.grad(skip_loss(solution), z0, retain_graph=True)
    torch.testing.assert_close(skip, (z0 - z).sign().detach() / z.numel())
    (none,) = torch.autograd.grad(z.sum(), z0, allow_unused=True)
    assert none is None


@each("shape", [(3, WIDTH + 1), (2, WIDTH), (1, WIDTH), (3,), (3, 1, WIDTH)])
def test_a_start_of_another_shape_is_refused_in_one_sentence(shape):
    cell = Dense()
    layer = DeepEquilibriumNetwork(cell, solver=TIGHT)
    with pytest.raises(ValueError, match=r"z0? has shape|z has shape") as caught:
        layer(dense_input(), z0=torch.zeros(shape, dtype=torch.float64))
    assert "\n" not in str(caught.value)
    assert cell.calls <= 2  # the one that failed, and why


def test_an_error_of_a_cell_that_takes_the_start_stays_as_it_is():
    class Failing(nn.Module):
        def forward(self, z, x):
            if z.any():
                raise RuntimeError("out of order")
            return z + x

    with pytest.raises(RuntimeError, match=r"^out of order$"):
        DeepEquilibriumNetwork(Failing())(dense_input(), z0=torch.zeros(3, WIDTH).double())


def test_a_chain_hands_the_start_and_the_states_to_its_equilibrium():
    layer = DeepEquilibriumNetwork(Dense(), solver=TIGHT, adjoint=EXACT)
    stem, head = nn.Linear(2, WIDTH).double(), nn.Linear(WIDTH, 3).double()
    chain, x = DEQChain(stem=stem, deq=layer, head=head), torch.randn(5, 2).double()
    z0 = torch.randn(5, WIDTH).double()
    y, solution = chain(x, z0=z0, states=[1, 2])
    assert torch.equal(solution.z0, z0)
    expected = fixed_point(lambda z: layer.cell(z, stem(x)), z0, solver=TIGHT, states=[1, 2])
    for a, b in zip(solution.states, expected.states, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(chain.predict_from(solution.value), y)
    assert chain.predict_from(solution.states[0]).shape == y.shape


def test_states_are_refused_where_there_is_no_solver():
    for layer, options, name in (
        (UnrolledNetwork(Dense(), steps=3), {}, "UnrolledNetwork$"),
        (DeepEquilibriumNetwork(Dense()), {"depth": 3}, "DeepEquilibriumNetwork with a depth$"),
    ):
        with pytest.raises(ValueError, match=f"without a solver there is no `states`.*{name}"):
            layer(dense_input(), states=2, **options)
