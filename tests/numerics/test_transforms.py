"""Equilibria under the transforms of torch.func, against those of a long fixed iteration."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from fastdeq import GMRES, DeepEquilibriumNetwork, fixed_point
from fastdeq.adjoints import AbstractAdjoint, Implicit, JacobianFree, Phantom, Unrolled
from fastdeq.nn import UnrolledNetwork
from fastdeq.solvers import NewtonKrylov
from tests.cells import DenseTanh
from tests.loops import each
from tests.numerics.gradients import BACKWARD, FORWARD

F64 = torch.float64
EXACT = Implicit(solver=GMRES(tol=1e-13, max_steps=40))
LBROYDEN = FORWARD["lbroyden"]
Map = Callable[[Tensor, Tensor], Tensor]


def draws() -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(size, 3, generator=draw, dtype=F64) for size in (2, 2, 3, 3)]


X, DX, W, DW = draws()
W, MAPPED = W / 5, torch.stack((W, -W, 0.5 * W)) / 5


def function(adjoint: AbstractAdjoint, solver: Any = LBROYDEN) -> Map:
    def value(x: Tensor, w: Tensor) -> Any:
        return fixed_point(
            lambda z: torch.tanh(z @ w.mT + x),
            torch.zeros_like(x),
            solver=solver,
            adjoint=adjoint,
        ).value

    return value


def iterated(x: Tensor, w: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(120):
        z = torch.tanh(z @ w.mT + x)
    return z


def layers(adjoint: AbstractAdjoint) -> tuple[Map, Map]:
    """A layer and its reference as functions of x and of a weight."""
    cell = DenseTanh(3, 0.6)

    def mapping(layer: nn.Module) -> Map:
        return lambda x, w: functional_call(layer, {"cell.state.weight": w}, (x,))[0]

    layer = DeepEquilibriumNetwork(cell, solver=LBROYDEN, adjoint=adjoint)
    return mapping(layer), mapping(UnrolledNetwork(cell, steps=120))


def scalar(f: Map) -> Map:
    return lambda x, w: f(x, w).sin().sum()


def squared(f: Map) -> Map:
    """A loss of a gradient."""
    return lambda x, w: grad(scalar(f))(x, w).square().sum()


def outside(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient by plain autograd around what torch.func does in the loss."""
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


FIRST: dict[str, Callable[[Map], Any]] = {
    "grad": lambda f: grad(scalar(f), (0, 1))(X, W),
    "vjp": lambda f: vjp(f, X, W)[1](DX),
    "jacrev": lambda f: jacrev(f, (0, 1))(X, W),
    "jvp": lambda f: jvp(f, (X, W), (DX, DW)),
    "jacfwd": lambda f: jacfwd(f, (0, 1))(X, W),
}
ENSEMBLES: dict[str, Callable[[Map], Any]] = {
    "vmap": lambda f: vmap(f, (None, 0))(X, MAPPED),
    "vmap of vmap": lambda f: vmap(vmap(f, (None, 0)), (0, None))(torch.stack((X, DX)), MAPPED),
    "vmap of grad": lambda f: vmap(grad(scalar(f), 1), (None, 0))(X, MAPPED),
    "vmap of jvp": lambda f: vmap(lambda w: jvp(f, (X, w), (DX, DW)))(MAPPED),
    "grad of vmap": lambda f: grad(lambda w: vmap(scalar(f), (None, 0))(X, w).sum())(MAPPED),
    "jvp of vmap": lambda f: jvp(lambda w: vmap(f, (None, 0))(X, w), (MAPPED,), (MAPPED,)),
    "autograd of vmap": lambda f: outside(lambda w: vmap(scalar(f), (None, 0))(X, w).sum(), MAPPED),
}
SECOND: dict[str, Callable[[Map], Any]] = {
    "grad of grad": lambda f: grad(squared(f), (0, 1))(X, W),
    "hessian": lambda f: hessian(scalar(f), (0, 1))(X, W),
    "jacrev of jacrev": lambda f: jacrev(jacrev(scalar(f)))(X, W),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(scalar(f)))(X, W),
    "jvp of grad": lambda f: jvp(lambda x: grad(scalar(f))(x, W), (X,), (DX,)),
    "grad of jvp": lambda f: grad(lambda x: jvp(lambda x: f(x, W), (x,), (DX,))[1].sum())(X),
    "vmap of hessian": lambda f: vmap(lambda w: hessian(scalar(f))(X, w))(MAPPED),
    "vmap of jacrev of jacrev": lambda f: vmap(lambda w: jacrev(jacrev(scalar(f)))(X, w))(MAPPED),
    "vmap of grad of grad": lambda f: vmap(grad(squared(f)), (None, 0))(X, MAPPED),
    "jacrev of jacrev of jacrev": lambda f: jacrev(jacrev(jacrev(lambda x: scalar(f)(x[:1], W))))(
        X
    ),
}


def assert_equal(got: Any, expected: Any) -> None:
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@each("adjoint", [EXACT, BACKWARD["anderson"], Phantom(steps=100, damping=1.0)])
@each("name", [*FIRST, *ENSEMBLES])
def test_first_derivatives_and_ensembles_of_an_equilibrium_are_exact(name, adjoint):
    transform = {**FIRST, **ENSEMBLES}[name]
    assert_equal(transform(function(adjoint)), transform(iterated))


@each("name", SECOND)
def test_nested_transforms_are_exact_whatever_the_order_of_the_adjoint(name):
    assert_equal(SECOND[name](function(EXACT)), SECOND[name](iterated))


@each("name", [*FIRST, *ENSEMBLES, "hessian", "grad of grad"])
def test_layers_under_functional_call_are_transformed(name):
    transform = {**FIRST, **ENSEMBLES, **SECOND}[name]
    layer, reference = layers(EXACT)
    assert_equal(transform(layer), transform(reference))


@each("name", [name for name in FORWARD if name != "newton_krylov"])
def test_every_solver_can_be_transformed(name):
    for transform in (FIRST["jvp"], ENSEMBLES["vmap of grad"], SECOND["hessian"]):
        assert_equal(transform(function(EXACT, FORWARD[name])), transform(iterated))


def test_autograd_differentiates_around_torch_func_as_often_as_the_order_says():
    f = function(replace(EXACT, order=2))
    for loss in (
        lambda f: lambda w: squared(f)(X, w),
        lambda f: lambda w: vmap(grad(scalar(f)), (None, 0))(X, w[None]).square().sum(),
    ):
        assert_equal(outside(loss(f), W), outside(loss(iterated), W))
        with pytest.raises(RuntimeError, match="set order=2"):
            outside(loss(function(EXACT)), W)


def test_the_answers_of_an_ensemble_are_those_of_separate_solves():
    f = function(EXACT)
    together = vmap(f, (None, 0))(X, MAPPED)
    alone = torch.stack([f(X, w) for w in MAPPED])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-14)


def test_the_record_of_an_ensemble_can_be_mapped():
    def record(w: Tensor) -> tuple[Tensor, ...]:
        found = fixed_point(lambda z: torch.tanh(z @ w.mT + X), 0 * X, trace="residuals")
        assert found.trace is not None
        return found.status, found.nfe, found.residual, found.trace.residuals

    mapped = vmap(record)(MAPPED)
    assert [tuple(each.shape[:2]) for each in mapped[:3]] == [(3, 2)] * 3
    alone = [record(w) for w in MAPPED]
    assert torch.equal(mapped[1], torch.stack([each[1] for each in alone]))


def test_batched_cotangents_give_a_jacobian():
    x = X.clone().requires_grad_()
    value = function(EXACT)(x, W)
    rows = torch.eye(value.numel(), dtype=F64).view(-1, *value.shape)
    (got,) = torch.autograd.grad(value, x, rows, is_grads_batched=True)
    assert_equal(got.view(2, 3, 2, 3), jacrev(iterated)(X, W))
    value = function(EXACT)(x, W)
    with pytest.raises(RuntimeError, match=r"use torch\.func\.jacrev"):
        torch.autograd.grad(value, x, rows, is_grads_batched=True, create_graph=True)


def test_a_failed_sample_of_an_ensemble_does_not_disturb_the_others():
    shift = torch.stack((torch.zeros(3, dtype=F64), torch.tensor([0.0, torch.nan, 0.0])))
    with pytest.warns(RuntimeWarning, match="of 2 of 4 samples"):
        got = vmap(lambda s: function(EXACT)(X + s, W))(shift)
    assert_equal(got[0], iterated(X, W))


class Normalized(nn.Module):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * (z - z.mean(dim=0)) + x)


def test_what_cannot_be_transformed_is_refused_with_the_cure():
    cases: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: vmap(function(EXACT, replace(LBROYDEN, per_sample=False)), (None, 0))(
                X, MAPPED
            ),
            "set per_sample=True, or loop",
        ),
        (
            lambda: vmap(
                function(Implicit(solver=GMRES(per_sample=False))),
                (None, 0),
            )(X, MAPPED),
            "set per_sample=True, or loop",
        ),
        (
            lambda: ENSEMBLES["vmap of grad"](function(Unrolled())),
            "use the Implicit adjoint",
        ),
        (
            lambda: jacfwd(jacfwd(scalar(function(EXACT))))(X, W),
            "let one of the two be reverse, as torch.func.hessian",
        ),
        (
            lambda: jvp(function(EXACT, NewtonKrylov()), (X, W), (DX, DW)),
            "use another solver",
        ),
    ]
    for call, cure in cases:
        with pytest.raises((RuntimeError, ValueError), match=cure):
            call()


@each("name", ["grad", "jvp", "jacrev"])
def test_jacobian_free_derivatives_are_those_of_one_evaluation(name):
    at = [function(EXACT)(X, W).detach()]

    def one(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(at[0] @ w.mT + x)

    def free(x: Tensor, w: Tensor) -> Tensor:
        return function(JacobianFree())(x, w)

    assert_equal(FIRST[name](free), FIRST[name](one))
