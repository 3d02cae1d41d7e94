"""Every kind of state has the solution and the gradients of the same problem as one tensor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdeq import DeepEquilibriumNetwork, Status, fixed_depth, fixed_point
from fastdeq.adjoints import Implicit, JacobianFree, Phantom, Unrolled
from fastdeq.flatten import scales_of
from fastdeq.nn import Zeros
from fastdeq.regularizers import jacobian_loss, residual_loss, skip_loss
from fastdeq.solvers import Anderson, ContinuousSolver, LimitedMemoryBroydenSolver, Picard
from tests.loops import each

F64 = torch.float64
SOLVERS = [
    Picard(tol=1e-10, max_steps=200),
    Anderson(tol=1e-10),
    LimitedMemoryBroydenSolver(tol=1e-10),
    ContinuousSolver(tol=1e-8, max_steps=500),
]
ADJOINTS = [Implicit(), JacobianFree(), Phantom(), Unrolled()]


def cut(z: Tensor) -> tuple[Tensor, Tensor]:
    return z[..., :2], z[..., 2:].unflatten(-1, (2, 2))


def joined(*scales: Tensor) -> Tensor:
    return torch.cat([scales[0], scales[1].flatten(-2)], dim=-1)


KINDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (cut, lambda z: joined(*z)),
    "dictionary": (
        lambda z: dict(zip(("a", "b"), cut(z), strict=True)),
        lambda z: joined(z["a"], z["b"]),
    ),
}
"""The kind from a flat state, and back."""


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    w = 0.3 * torch.randn(6, 6, generator=generator, dtype=F64)
    x = torch.randn(3, 6, generator=generator, dtype=F64)
    return w.requires_grad_(), x.requires_grad_()


def solved(f: Any, z0: Any, **options: Any) -> Any:
    return fixed_point(f, z0, **options)


@each("kind", KINDS)
@each("solver", SOLVERS)
@each("adjoint", ADJOINTS)
def test_a_state_of_several_scales_equals_the_same_state_as_one_tensor(kind, solver, adjoint):
    (made, flat), leaves = KINDS[kind], weights()
    w, x = leaves
    settings = {"solver": solver, "adjoint": adjoint, "states": [2]}
    one = solved(lambda z: torch.tanh(z @ w + x), torch.zeros(3, 6, dtype=F64), **settings)
    other = solved(
        lambda z: made(torch.tanh(flat(z) @ w + x)), made(torch.zeros(3, 6, dtype=F64)), **settings
    )
    assert type(other.value) is type(other.states[0]) is type(made(x))
    pairs = [(one.value, flat(other.value)), (one.states[0], flat(other.states[0]))]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        got, expected = (
            torch.autograd.grad(z.square().sum(), leaves, retain_graph=True) for z in (b, a)
        )
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-14)
    assert torch.equal(one.nfe, other.nfe)


@each("solver", SOLVERS)
@each("adjoint", ADJOINTS)
def test_an_unbatched_state_equals_a_batch_of_one(solver, adjoint):
    leaves = weights()
    w, x = leaves

    def f(z):
        return torch.tanh(z @ w + x[0])

    settings = {"solver": solver, "adjoint": adjoint, "states": 2}
    one = solved(f, torch.zeros(1, 6, dtype=F64), **settings)
    other = solved(f, torch.zeros(6, dtype=F64), batched=False, **settings)
    assert other.value.shape == other.states[0].shape == (6,)
    assert other.status.shape == other.nfe.shape == (1,)
    torch.testing.assert_close(other.value, one.value[0], rtol=0, atol=0)
    got, expected = (torch.autograd.grad(s.value.square().sum(), leaves) for s in (other, one))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-14)


def test_unbatched_scales_may_be_numbers_and_need_not_agree_in_an_axis():
    z0 = {"a": torch.zeros((), dtype=F64), "b": torch.zeros(2, 3, dtype=F64)}
    solution = solved(
        lambda z: {"b": z["b"] / 2 + z["a"], "a": z["a"] / 2 + 1},  # in another order
        z0,
        solver=Picard(tol=1e-12, max_steps=100),
        batched=False,
    )
    assert list(solution.value) == ["a", "b"]
    torch.testing.assert_close(solution.value["a"], torch.tensor(2.0, dtype=F64))
    torch.testing.assert_close(solution.value["b"], torch.full((2, 3), 4.0, dtype=F64))


def test_the_auxiliary_value_is_that_of_the_closing_evaluation():
    w, x = weights()
    seen: list[Tensor] = []

    def f(z):
        seen.append(z)
        h = z @ w + x
        return torch.tanh(h), {"h": h}

    for adjoint in ADJOINTS:
        solution = solved(f, torch.zeros(3, 6, dtype=F64), adjoint=adjoint, has_aux=True, states=2)
        closing = seen[-3 if not isinstance(adjoint, Phantom) else -11]  # two states follow
        torch.testing.assert_close(solution.aux["h"], closing @ w + x, rtol=0, atol=0)
        plain = solved(lambda z: f(z)[0], torch.zeros(3, 6, dtype=F64), adjoint=adjoint)
        torch.testing.assert_close(solution.value, plain.value, rtol=0, atol=0)
        (got,) = torch.autograd.grad(solution.aux["h"].sum(), w)
        assert got.abs().sum() > 0
        seen.clear()


def test_an_f_without_an_auxiliary_value_is_refused():
    with pytest.raises(TypeError, match=r"f returns a Tensor.*a pair \(value, aux\)"):
        solved(lambda z: z / 2, torch.ones(2, 2), has_aux=True)


@each("adjoint", ADJOINTS)
@each("kind", ["tensor", *KINDS])
def test_an_empty_batch_passes_through_with_zero_gradients(kind, adjoint):
    made, flat = KINDS.get(kind, (lambda z: z, lambda z: z))
    w, _ = weights()
    x = torch.zeros(0, 6, dtype=F64, requires_grad=True)
    z0 = made(torch.zeros(0, 6, dtype=F64))
    solution = solved(lambda z: made(torch.tanh(flat(z) @ w + x)), z0, adjoint=adjoint, states=2)
    for state in (solution.value, *solution.states):
        shapes = [(each.shape, each.dtype) for each in scales_of(state)]
        assert shapes == [(each.shape, F64) for each in scales_of(z0)]
    for name in ("status", "steps", "nfe", "residual", "relative_residual"):
        assert getattr(solution, name).shape == (0,)
    assert solution.status.dtype == torch.int64
    to_w, to_x = torch.autograd.grad(flat(solution.value).sum(), (w, x))
    assert torch.equal(to_w, torch.zeros_like(w))
    assert to_x.shape == (0, 6)


def test_an_empty_batch_passes_through_a_layer_and_its_depth():
    class Cell(torch.nn.Linear):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
            return torch.tanh(super().forward(z) + x)

    layer = DeepEquilibriumNetwork(Cell(4, 4))
    for depth in (None, 3):
        z, solution = layer(torch.zeros(0, 4), depth=depth)
        assert z.shape == (0, 4)
        assert not len(solution.status)
        z.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_layers_and_regularizers_take_dictionaries():
    class Cell(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = torch.nn.Linear(2, 3)

        def forward(self, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
            return {"fast": 0.3 * z["fast"] + x, "slow": torch.tanh(self.mix(z["fast"]))}

    layer = DeepEquilibriumNetwork(Cell(), initializer=Zeros({"fast": [2], "slow": [3]}))
    z, solution = layer(torch.ones(4, 2), jacobian_loss=True)
    assert isinstance(z, dict)
    torch.testing.assert_close(z["fast"], torch.full((4, 2), 1 / 0.7), rtol=1e-3, atol=0)
    loss = skip_loss(solution) + residual_loss(solution) + solution.jacobian_loss
    loss.backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert jacobian_loss(lambda z: z, z).item() > 0
    same, _ = layer({"fast": torch.ones(4, 2)}["fast"], z0={k: v.detach() for k, v in z.items()})
    torch.testing.assert_close(same["slow"], z["slow"], rtol=1e-3, atol=1e-4)
    assert isinstance(fixed_depth(lambda z: z, z, depth=2).value, dict)


@each(
    "output, message",
    [
        ({"a": torch.zeros(2, 1)}, "f.z. is a dictionary of a but z is a dictionary of a, b"),
        (torch.zeros(2, 1), "f.z. is a tensor but z is a dictionary of a, b"),
        ((torch.zeros(2, 1),) * 2, "f.z. is a tuple but z is a dictionary of a, b"),
    ],
)
def test_an_f_that_returns_another_structure_is_refused(output, message):
    with pytest.raises(ValueError, match=message):
        solved(lambda z: output, {"a": torch.zeros(2, 1), "b": torch.zeros(2, 1)})


def test_a_compact_solve_takes_dictionaries_and_gives_the_same():
    w, x = weights()
    made, flat = KINDS["dictionary"]

    def of(rows):
        return lambda z: made(torch.tanh(flat(z) @ w + x[rows]))

    every, z0 = slice(None), made(torch.zeros(3, 6, dtype=F64))
    plain, compact = (
        solved(of(every), z0, solver=Picard(tol=1e-10, max_steps=200, compact=share), select=of)
        for share in (None, 0.3)
    )
    torch.testing.assert_close(flat(compact.value), flat(plain.value), rtol=1e-12, atol=1e-12)
    assert (compact.status == Status.CONVERGED).all()
