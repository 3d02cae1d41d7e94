"""Layers in pretraining, in chains, copied, evaluated, and in mixed precision."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdeq import DeepEquilibriumNetwork, DEQChain, Status
from fastdeq.adjoints import Implicit, JacobianFree, Phantom, Unrolled
from fastdeq.nn import DenseCell, VariationalDropout, weight_norm
from fastdeq.solvers import (
    Anderson,
    Picard,
)
from tests.cells import TIGHT
from tests.loops import each
from tests.nn.layers import WIDTH, Dense, build, dense_input, every_start, explicit_network, grad

# Pretraining and the explicit prediction


@every_start
def test_a_fixed_depth_is_the_unrolled_loop_with_its_gradients(start):
    layer, x = build(start, Dense()), dense_input()
    y, solution = layer(x, depth=3)
    y.square().sum().backward()
    got = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad(set_to_none=True)
    z: Any = layer.explicit(x) if start != "vanilla" else torch.zeros_like(x)
    for _ in range(3):
        z = layer.cell(z, x)
    z.square().sum().backward()
    torch.testing.assert_close(y, z)
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(got[name], p.grad)
    assert (solution.status == Status.NOT_SOLVED).all()
    assert (solution.nfe == 3).all()
    assert not solution.converged.any()


def test_leaving_the_fixed_depth_solves_again():
    layer, x = DeepEquilibriumNetwork(Dense()), dense_input()
    assert not layer(x, depth=1)[1].converged.any()
    assert layer(x)[1].converged.all()


@each("start, calls", [("explicit", 0), ("skip_reg", 1)])
def test_the_explicit_prediction_is_z0_without_a_solve(start, calls):
    cell, x = Dense(), dense_input()
    layer = build(start, cell)
    prediction = layer.explicit(x)
    assert cell.calls == calls
    torch.testing.assert_close(prediction, layer(x)[1].z0)


def test_a_vanilla_layer_refuses_to_predict():
    with pytest.raises(ValueError, match="use SkipDeepEquilibriumNetwork"):
        DeepEquilibriumNetwork(Dense()).explicit(dense_input())


# Chains


def test_a_chain_is_the_composition_of_its_layers():
    stem, head = explicit_network(), explicit_network()
    deq, x = build("explicit", Dense()), dense_input()
    chain = DEQChain(stem, deq, head)
    y, solution = chain(x, jacobian_loss=True)
    torch.testing.assert_close(y, head(deq(stem(x))[0]))
    torch.testing.assert_close(chain.explicit(x), head(deq.explicit(stem(x))))
    assert solution.jacobian_loss is not None
    assert chain.equilibrium is deq


def test_a_layer_may_be_used_twice_in_a_chain():
    shared, deq, x = explicit_network(), DeepEquilibriumNetwork(Dense()), dense_input()
    torch.testing.assert_close(DEQChain(shared, deq, shared)(x)[0], shared(deq(shared(x))[0]))


def test_a_chain_keeps_the_names_of_its_layers():
    named = DEQChain(stem=nn.Linear(4, 4), deq=DeepEquilibriumNetwork(Dense()))
    assert {key.split(".")[0] for key in named.state_dict()} == {"stem", "deq"}


def test_a_layer_of_a_chain_may_be_named_equilibrium():
    deq = DeepEquilibriumNetwork(Dense())
    chain = DEQChain(stem=explicit_network(), equilibrium=deq)
    assert chain(dense_input())[1].converged.all()
    assert chain.equilibrium is deq


def test_a_chain_needs_an_equilibrium_layer():
    with pytest.raises(ValueError, match="at least one equilibrium layer, but got none"):
        DEQChain(nn.Linear(4, 4))


def test_a_chain_holds_modules_only():
    with pytest.raises(TypeError, match="layer '1' of the chain is a builtin_function"):
        DEQChain(DeepEquilibriumNetwork(Dense()), torch.tanh)  # type: ignore[arg-type]


# Copies

VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "plain": Dense,
    "weight_norm": lambda: weight_norm(Dense()),
    "dropout": lambda: Dense(VariationalDropout(0.5)),
}


def same_output(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    outputs = []
    for layer in (one, other):
        torch.manual_seed(1)  # the same dropout mask
        outputs.append(layer(x)[0])
    return torch.equal(*outputs)


@each("variant", VARIANTS)
def test_copies_and_loaded_states_give_the_same_output(variant):
    layer, x = build("explicit", VARIANTS[variant]()), dense_input()
    layer(x)[0].sum().backward()  # a used layer must not be harder to copy than a new one
    other = build("explicit", VARIANTS[variant]())
    assert not same_output(layer, other, x)
    other.load_state_dict(layer.state_dict())
    assert same_output(layer, other, x)
    assert same_output(layer, copy.deepcopy(layer), x)


def test_a_pickled_layer_has_the_same_settings():
    solver, adjoint = Anderson(memory=3), Implicit(solver=Picard(damping=0.5))
    layer = DeepEquilibriumNetwork(DenseCell(WIDTH), solver=solver, adjoint=adjoint)
    again = pickle.loads(pickle.dumps(layer))
    assert (again.solver, again.adjoint) == (solver, adjoint)
    assert same_output(layer, again, torch.ones(2, WIDTH))


# Evaluation and mixed precision


def test_in_evaluation_a_sample_does_not_depend_on_the_rest_of_the_batch():
    norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64)
    layer, x = DeepEquilibriumNetwork(Dense(norm), solver=TIGHT), dense_input(8)
    norm(x)  # in training: running statistics that are not the initial ones
    layer.eval()
    alone = torch.cat([layer(sample[None])[0] for sample in x])
    # Both are within the solver's relative 1e-12 of the equilibrium.
    torch.testing.assert_close(layer(x)[0], alone, rtol=1e-10, atol=1e-10)


def test_without_gradients_the_value_is_the_same_and_holds_no_graph():
    layer, x = build("explicit", Dense()), dense_input()
    y, _ = layer(x)
    with torch.no_grad():
        quiet, solution = layer(x)
    with torch.inference_mode():
        inferred, _ = layer(x)
    assert torch.equal(quiet, y)
    assert torch.equal(inferred, y)
    assert not quiet.requires_grad
    assert not solution.defect.requires_grad
    assert not solution.z0.requires_grad


@each("adjoint", [Implicit(), JacobianFree(), Phantom(), Unrolled()])
@every_start
def test_under_autocast_the_state_stays_float32_and_weights_keep_their_gradients(start, adjoint):
    # Older torch reuses casts made without gradients where gradients are on (pytorch 112583).
    cell, x = Dense(), dense_input().float()
    layer = build(start, cell, adjoint=adjoint).float()
    layer(x)[0].sum().backward()
    wanted = grad(cell.state.weight)
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y, solution = layer(x)
    y.sum().backward()
    for kept in (y, solution.value, solution.z0, solution.defect, solution.residual):
        assert kept.dtype == torch.float32
    # bfloat16 has 8 bits: 0.4 % per operation, a few of them in a row.
    largest = wanted.abs().max().item()
    torch.testing.assert_close(grad(cell.state.weight), wanted, rtol=0, atol=0.05 * largest)
