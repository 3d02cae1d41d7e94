"""One call of an equilibrium layer is one function: its masks, weights and running statistics."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from fastdeq import DeepEquilibriumNetwork, SkipDeepEquilibriumNetwork, fixed_point
from fastdeq.adjoints import Implicit, Phantom, Unrolled
from fastdeq.krylov import GMRES
from fastdeq.nn import VariationalDropout, weight_norm
from fastdeq.nn.call import CellCall
from fastdeq.solvers import LimitedMemoryBroydenSolver
from tests.cells import EXACT, TIGHT, DenseTanh
from tests.loops import each
from tests.nn.layers import recorded_masks

WIDTH = 6


class Dense(DenseTanh):
    """A contraction also with features doubled by dropout."""

    def __init__(self, extra: nn.Module | None = None) -> None:
        super().__init__(WIDTH, 0.4, extra)


class Broken(nn.Module):
    """Fails at the third evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, h: Tensor) -> Tensor:
        self.count += 1
        if self.count == 3:
            raise ArithmeticError
        return h


def dense_input(batch: int = 5) -> Tensor:
    return torch.randn(batch, WIDTH, dtype=torch.float64)


def grads(module: nn.Module) -> list[Tensor]:
    """The gradients of all parameters, which are then cleared."""
    found = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(found) == len(list(module.parameters()))
    module.zero_grad(set_to_none=True)
    return found


def all_equal(masks: list[Tensor]) -> bool:
    return all(torch.equal(mask, masks[0]) for mask in masks)


# Variational dropout


@each("adjoint", [Implicit(), Phantom(), Unrolled()])
@each("depth", [None, 3])
def test_all_evaluations_of_a_call_see_one_mask(adjoint, depth):
    dropout, x = VariationalDropout(0.5), dense_input()
    masks = recorded_masks(dropout)
    layer = SkipDeepEquilibriumNetwork(Dense(dropout), adjoint=adjoint)
    y, solution = layer(x, jacobian_loss=True, depth=depth)
    (y.sum() + solution.jacobian_loss).backward()
    assert len(masks) > 4  # start, depth or solve, and the regularizer's
    assert set(masks[0].unique().tolist()) == {0.0, 2.0}
    assert all_equal(masks)


def test_every_call_draws_a_new_mask():
    dropout, x = VariationalDropout(0.5), dense_input()
    masks = recorded_masks(dropout)
    layer = DeepEquilibriumNetwork(Dense(dropout))
    layer(x)
    first = masks.copy()
    masks.clear()
    layer(x)
    assert all_equal(first)
    assert all_equal(masks)
    assert not torch.equal(first[0], masks[0])


def test_an_earlier_call_keeps_its_mask_after_a_later_one():
    dropout, x = VariationalDropout(0.5), dense_input()
    masks = recorded_masks(dropout)
    cell = Dense(dropout)
    one, other = CellCall(cell, x), CellCall(cell, x)
    for call in (one, other, one, other):
        call(torch.ones_like(x))
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])


@each("adjoint", [EXACT, Phantom()])
def test_two_calls_before_one_backward_give_the_gradients_of_both(adjoint):
    cell, x = Dense(VariationalDropout(0.5)), dense_input()
    layer = DeepEquilibriumNetwork(cell, solver=TIGHT, adjoint=adjoint)

    def outputs():
        torch.manual_seed(1)
        for _ in range(2):
            yield layer(x)[0].square().sum()

    sum(outputs()).backward()
    together = grads(layer)
    for output in outputs():
        output.backward()
    torch.testing.assert_close(together, grads(layer))


def test_a_checkpoint_in_the_cell_sees_the_mask_of_the_call_or_is_refused():
    class Checkpointed(Dense):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            output: Tensor = checkpoint(super().forward, z, x, use_reentrant=False)
            return output

    plain = Dense(VariationalDropout(0.5))
    saving = Checkpointed(VariationalDropout(0.5))
    saving.load_state_dict(plain.state_dict())
    x, found = dense_input(), []
    for cell in (plain, saving):
        torch.manual_seed(1)
        y, _ = DeepEquilibriumNetwork(cell, solver=TIGHT, adjoint=EXACT)(x)
        try:
            y.sum().backward()
        except RuntimeError:  # a refusal is as good; a silently wrong gradient is not
            return
        found.append(grads(cell))
    torch.testing.assert_close(*found)


def test_after_a_call_the_mask_is_gone():
    dropout, x = VariationalDropout(0.5), dense_input()
    DeepEquilibriumNetwork(Dense(dropout))(x)
    assert not torch.equal(dropout(x), dropout(x))


def test_in_evaluation_dropout_is_the_identity():
    dropout, x = VariationalDropout(0.5), dense_input()
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(VariationalDropout(0.0)(x), x)


def test_alone_every_evaluation_draws_a_new_mask():
    dropout, x = VariationalDropout(0.5), torch.ones(20, 20)
    assert not torch.equal(dropout(x), dropout(x))


@each("shape", [(6, 5), (6, 5, 7), (6, 5, 3, 4)])
def test_whole_features_are_dropped(shape):
    kept = VariationalDropout(0.5)(torch.ones(shape)).reshape(6, 5, -1)
    assert torch.equal(kept, kept[:, :, :1].expand_as(kept))
    assert kept[:, :, 0].unique().tolist() == [0.0, 2.0]


@each("p", [0.1, 0.3, 0.8])
def test_dropout_keeps_the_expectation(p):
    count = 100_000
    kept = VariationalDropout(p)(torch.ones(count, 1, dtype=torch.float64))
    assert kept.max().item() == pytest.approx(1 / (1 - p))
    # Five standard errors of a mean of Bernoulli(1 − p) / (1 − p).
    assert abs(kept.mean().item() - 1) < 5 * (p / (1 - p) / count) ** 0.5
    assert abs((kept == 0).double().mean().item() - p) < 5 * (p * (1 - p) / count) ** 0.5


@each("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_probability_out_of_range_is_refused(p):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        VariationalDropout(p)


def test_a_failing_cell_leaves_the_layer_as_it_was():
    dropout, norm = VariationalDropout(0.5), nn.BatchNorm1d(WIDTH, dtype=torch.float64)
    layer, x = DeepEquilibriumNetwork(Dense(nn.Sequential(dropout, norm, Broken()))), dense_input()
    masks = recorded_masks(dropout)
    with pytest.raises(ArithmeticError):
        layer(x)
    assert norm.track_running_stats
    assert norm.num_batches_tracked == 0
    first = masks.copy()
    masks.clear()
    layer(x)
    assert not torch.equal(first[0], masks[0])


# Weight norm and other parametrizations


def count_of(layer: nn.Linear) -> list[int]:
    """Grows by one whenever the parametrized weight of `layer` is computed."""
    counted: list[int] = []
    parametrizations: Any = layer.parametrizations
    (made,) = parametrizations.weight
    made.register_forward_hook(lambda *_: counted.append(1))
    return counted


@each("parametrized", [weight_norm, lambda cell: spectral_norm(cell.state)])
@each("depth", [None, 3])
@each("gradients", [True, False])
def test_a_parametrized_weight_is_computed_once_per_call(parametrized, depth, gradients):
    cell, x = Dense(), dense_input()
    parametrized(cell)
    layer = SkipDeepEquilibriumNetwork(cell)
    counted = count_of(cell.state)
    with torch.set_grad_enabled(gradients):
        for calls in (1, 2):
            y, solution = layer(x, jacobian_loss=True)
            assert len(counted) == calls
    if gradients:
        (y.sum() + solution.jacobian_loss).backward()
        assert len(counted) == 2


def test_gradients_of_magnitude_and_direction_are_those_without_a_cache():
    cell, x = Dense(), dense_input()
    weight_norm(cell)
    layer = DeepEquilibriumNetwork(cell, solver=TIGHT, adjoint=EXACT)
    layer(x)[0].square().sum().backward()
    cached = grads(cell)
    uncached: Any = fixed_point(
        lambda z: cell(z, x), torch.zeros_like(x), solver=TIGHT, adjoint=EXACT
    ).value
    uncached.square().sum().backward()
    torch.testing.assert_close(cached, grads(cell))
    # And an independent reference: w = g v / ‖v‖ by hand, iterated long enough.
    pairs: Any = [m.parametrizations for m in (cell.state, cell.injection)]
    leaves = [(pair.weight.original0, pair.weight.original1) for pair in pairs]
    w, u = (g * v / v.norm(dim=1, keepdim=True) for g, v in leaves)
    z = torch.zeros_like(x)
    for _ in range(60):  # the cell contracts by 0.4: 0.4⁶⁰ is below the rounding
        z = torch.tanh(z @ w.mT + cell.state.bias + x @ u.mT)
    z.square().sum().backward()
    torch.testing.assert_close(cached, grads(cell))


def test_the_cache_ends_with_the_call():
    cell, x = Dense(), dense_input()
    weight_norm(cell)
    layer = DeepEquilibriumNetwork(cell)
    before = layer(x)[0]
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(1.5)
    assert not torch.allclose(before, layer(x)[0], atol=1e-2)


def test_a_weight_normalized_cell_can_be_copied_after_use_and_run_without_gradients():
    cell, x = Dense(), dense_input()
    weight_norm(cell)
    layer = DeepEquilibriumNetwork(cell)
    y, _ = layer(x)
    y.sum().backward()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        assert torch.equal(twin(x)[0], y)
        assert torch.equal(layer(x)[0], y)
    layer(x)[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_weight_norm_leaves_the_function_as_it_is_and_covers_every_layer():
    cell = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    before = cell(x)
    assert weight_norm(cell) is cell
    torch.testing.assert_close(cell(x), before)
    assert all(parametrize.is_parametrized(cell[i], "weight") for i in (0, 2))


def test_weight_norm_refuses_what_it_cannot_normalize():
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        weight_norm(nn.ReLU())


# Running statistics


@each("momentum", [0.1, None])
@each("depth", [None, 3])
@each("adjoint", [Implicit(solver=GMRES(per_sample=False)), Phantom()])
def test_running_statistics_move_once_per_call_to_those_at_the_equilibrium(
    momentum, depth, adjoint
):
    norm, x = nn.BatchNorm1d(WIDTH, momentum=momentum, dtype=torch.float64), dense_input(8)
    layer = DeepEquilibriumNetwork(
        Dense(nn.Sequential(norm, VariationalDropout(0.0))),
        solver=LimitedMemoryBroydenSolver(max_steps=5, per_sample=False),
        adjoint=adjoint,
    )
    reference = copy.deepcopy(layer.cell)
    wanted = reference.get_submodule("extra.0")
    for call in (1, 2):
        y, solution = layer(x * call, jacobian_loss=True)
        (y.sum() + solution.jacobian_loss).backward()
        with torch.no_grad():
            reference(y, x * call)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(norm, name), getattr(wanted, name))
        assert norm.num_batches_tracked == call


@each("training, extra", [(True, 1), (False, 0)])
def test_moving_the_statistics_costs_one_evaluation_and_only_in_training(training, extra):
    norm, calls = nn.BatchNorm1d(WIDTH, dtype=torch.float64), [0]
    norm.register_forward_hook(lambda *_: calls.append(1))
    solver = LimitedMemoryBroydenSolver(per_sample=False)
    layer = DeepEquilibriumNetwork(Dense(norm), solver=solver).train(training)
    _, solution = layer(dense_input(8))
    assert sum(calls) == solution.nfe[0] + extra


@each("frozen", ["layer", "norm"])
def test_running_statistics_do_not_change_in_evaluation(frozen):
    norm, x = nn.BatchNorm1d(WIDTH, dtype=torch.float64), dense_input(8)
    layer = DeepEquilibriumNetwork(Dense(norm))
    norm(x)
    before = copy.deepcopy(norm.state_dict())
    (layer if frozen == "layer" else norm).eval()
    layer(x, jacobian_loss=True)
    assert all(torch.equal(before[key], kept) for key, kept in norm.state_dict().items())
    assert norm.track_running_stats


def test_a_dropout_that_is_used_in_two_places_has_a_mask_for_each():
    class Twice(Dense):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            self.seen = (self.extra(torch.ones_like(z)), self.extra(torch.ones(len(z), 64)))
            return torch.tanh(self.state(z) * 0.5 * self.seen[0] + self.injection(x))

    cell, masks = Twice(VariationalDropout(0.5)), []
    cell.register_forward_hook(lambda module, args, output: masks.append(module.seen))
    DeepEquilibriumNetwork(cell, solver=TIGHT, adjoint=EXACT)(dense_input())
    for first, second in masks:
        assert torch.equal(first, masks[0][0])
        assert torch.equal(second, masks[0][1])


def test_instance_norm_statistics_move_once_per_call_and_not_in_evaluation():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm1d(2, track_running_stats=True)
            self.values: list[Tensor] = []

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            output = 0.1 * torch.tanh(self.norm(z)) + x
            assert self.norm.running_mean is not None
            self.values.append(self.norm.running_mean.clone())
            return output

    cell, x = Normed(), torch.randn(3, 2, 5)
    layer = DeepEquilibriumNetwork(cell)
    layer(x)
    moved = [bool((value != 0).any()) for value in cell.values]
    assert moved == [False] * (len(moved) - 1) + [True]
    cell.values.clear()
    layer.eval()(x)
    assert all(torch.equal(value, cell.values[0]) for value in cell.values)
