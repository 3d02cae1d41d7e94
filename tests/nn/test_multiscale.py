"""Equilibria of several scales: cells, layers, gradients, and what is refused."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fastdeq import (
    GMRES,
    DeepEquilibriumNetwork,
    DEQChain,
    MultiScaleDeepEquilibriumNetwork,
    MultiScaleSkipDeepEquilibriumNetwork,
    Status,
)
from fastdeq.adjoints import Implicit, JacobianFree
from fastdeq.flatten import Layout, scales_of
from fastdeq.nn import (
    DenseCell,
    MultiScaleCell,
    MultiScaleExplicitNetwork,
    MultiScaleResidualCell,
    VariationalDropout,
    image_scales,
)
from fastdeq.regularizers import skip_loss
from fastdeq.solvers import Anderson, LimitedMemoryBroydenSolver
from fastdeq.training import Pretraining
from tests.loops import each
from tests.nn.scales import WIDTHS, Injected, dense_cell
from tests.problems import dense_jacobian

STARTS = ("vanilla", "skip", "skip_reg")

every_start = each("start", STARTS)
every_normalization = each("normalization", ["batch", "group"])


class Predicted(nn.Module):
    """A linear map of the input for each scale."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(WIDTHS[0], width) for width in WIDTHS)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(predict(x) for predict in self.maps)


def set_mapping(cell: MultiScaleCell, j: int, i: int, module: nn.Module) -> None:
    row = cell.mappings[j]
    assert isinstance(row, nn.ModuleList)
    row[i] = module


def build(start: str, cell: MultiScaleCell, **options: Any) -> DeepEquilibriumNetwork:
    if start == "vanilla":
        return MultiScaleDeepEquilibriumNetwork(cell, **options)
    explicit = Predicted() if start == "skip" else None
    return MultiScaleSkipDeepEquilibriumNetwork(cell, explicit, **options)


def conv_cell(normalization: Literal["batch", "group"], *, dropout: float = 0.0) -> MultiScaleCell:
    return MultiScaleResidualCell(
        [1, 4, 4], [2, 4], expansion=2, normalization=normalization, dropout=dropout
    )


def damped(cell: MultiScaleCell) -> MultiScaleCell:
    """In float64, with an equilibrium that is easily found: new weights make no contraction.

    Scale 1 is determined by its injection: the terms of other scales and of the state are small.
    """
    names = ["post_fusion.0", "post_fusion.1", "branches.1.norm3", "mappings.1.0"]
    with torch.no_grad():
        for module in map(cell.get_submodule, names):
            norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
            norms[-1].weight.fill_(0.1)
    return cell.double()


def settings(per_sample: bool, tol: float = 1e-3, max_steps: int = 60) -> dict[str, Any]:
    linear = GMRES(tol=tol, max_steps=200, per_sample=per_sample)
    solver = LimitedMemoryBroydenSolver(
        tol=tol, max_steps=max_steps, memory=max_steps, per_sample=per_sample
    )
    return {"solver": solver, "adjoint": Implicit(solver=linear)}


# The cell


def test_a_cell_is_its_formula():
    cell, x = dense_cell(post_fusion=True), torch.randn(5, 4)
    z = tuple(torch.randn(5, width) for width in WIDTHS)
    h = [cell.branches[0](z[0], x), *(cell.branches[j](z[j]) for j in (1, 2, 3))]
    for i, y in enumerate(cell(z, x)):
        parts = [cell.get_submodule(f"mappings.{j}.{i}")(h[j]) for j in range(4)]
        fused = torch.stack(parts).sum(dim=0)
        torch.testing.assert_close(y, torch.tanh(fused))


@every_normalization
def test_the_published_cell_keeps_its_scales_and_every_scale_sees_every_other(normalization):
    cell = MultiScaleResidualCell(
        [3, 32, 32], [4, 8, 16], expansion=2, downsample_times=1, normalization=normalization
    )
    assert cell.scales == [(4, 16, 16), (8, 8, 8), (16, 4, 4)]
    z = tuple(torch.randn(2, *shape, requires_grad=True) for shape in cell.scales)
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    for scale, y in zip(z, cell(z, x), strict=True):
        assert y.shape == scale.shape
        reached = torch.autograd.grad(y.square().sum(), (*z, x), retain_graph=True)
        assert all(gradient.abs().sum() > 0 for gradient in reached)


def test_flatten_and_unflatten_give_the_scales_of_a_cell_back():
    cell = conv_cell("group")
    z = tuple(torch.randn(3, *shape) for shape in cell.scales)
    layout = Layout.of(z)
    flat = layout.flatten(z)
    assert flat.shape == (3, 2 * 16 + 4 * 4)
    again = layout.unflatten(flat)
    assert all(torch.equal(one, other) for one, other in zip(z, again, strict=True))


# The layers


@every_start
@each("post_fusion", [False, True])
def test_four_dense_scales_have_an_equilibrium_and_train(start, post_fusion):
    cell, x = dense_cell(post_fusion), torch.randn(5, 4)
    layer = build(start, cell, solver=LimitedMemoryBroydenSolver(tol=1e-5))
    y, solution = layer(x, jacobian_loss=True)
    assert isinstance(y, tuple)
    assert [scale.shape for scale in y] == [(5, width) for width in WIDTHS]
    assert solution.converged.all()
    for scale, again in zip(y, cell(y, x), strict=True):
        # The relative tolerance 1e-5, of a contraction, in float32.
        torch.testing.assert_close(scale, again, rtol=1e-4, atol=1e-4)
    loss = skip_loss(solution) + sum(scale.square().sum() for scale in y) + solution.jacobian_loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@every_start
def test_a_fixed_depth_unrolls_all_scales_and_leaving_it_solves(start):
    cell, x = dense_cell(), torch.randn(5, 4)
    layer = build(start, cell)
    y, solution = layer(x, depth=3)
    z = solution.z0
    for _ in range(3):
        z = cell(z, x)
    for scale, wanted in zip(y, z, strict=True):
        torch.testing.assert_close(scale, wanted)
    assert (solution.status == Status.NOT_SOLVED).all()
    assert layer(x)[1].converged.all()


def test_a_multiscale_chain_hands_the_depth_of_pretraining_on():
    chain, callback = DEQChain(build("skip_reg", dense_cell())), Pretraining(steps=1, depth=2)
    assert (chain(torch.randn(5, 4), depth=callback.depth_of(0))[1].nfe == 2).all()
    assert chain(torch.randn(5, 4), depth=callback.depth_of(1))[1].converged.all()


def test_an_ordinary_layer_takes_a_multiscale_cell_too():
    cell, x = dense_cell(), torch.randn(5, 4)
    plain, named = DeepEquilibriumNetwork(cell), MultiScaleDeepEquilibriumNetwork(cell)
    for one, other in zip(plain(x)[0], named(x)[0], strict=True):
        assert torch.equal(one, other)


def test_the_published_skip_network_predicts_the_scales_of_its_cell():
    cell = conv_cell("group")
    explicit = MultiScaleExplicitNetwork([2, 4], normalization="group")
    layer = MultiScaleSkipDeepEquilibriumNetwork(cell, explicit)
    predicted = layer.explicit(torch.randn(3, 2, 4, 4))
    assert [scale.shape[1:] for scale in scales_of(predicted)] == cell.scales


# Gradients


@every_normalization
def test_the_gradient_is_that_of_dense_algebra(normalization):
    """Group norm per sample, batch statistics as one system: each against (I − Jᵀ)⁻¹."""
    torch.manual_seed(3)
    per_sample = normalization == "group"
    cell = damped(conv_cell(normalization))
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    layer = MultiScaleDeepEquilibriumNetwork(cell, **settings(per_sample, 1e-12, 400))
    y, solution = layer(x)
    assert solution.converged.all()
    layout = Layout.of(y)
    exact = layout.flatten(y).detach()
    w = torch.randn_like(exact)
    leaves = [x, *cell.parameters()]
    got = torch.autograd.grad(layout.flatten(y), leaves, w)

    def flat_f(z: Tensor) -> Tensor:
        return layout.flatten_output(cell(layout.unflatten(z), x), z)

    jacobian = dense_jacobian(flat_f, exact)
    eye = torch.eye(len(jacobian), dtype=torch.float64)
    v = torch.linalg.solve(eye - jacobian.mT, w.reshape(-1)).view_as(w)
    wanted = torch.autograd.grad(flat_f(exact), leaves, v)
    for one, other in zip(got, wanted, strict=True):
        # Both solves are tight to 1e-12; curvature and conditioning take a few digits.
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@every_start
def test_with_group_norm_a_sample_does_not_depend_on_the_rest_of_the_batch(start):
    torch.manual_seed(0)
    cell = damped(conv_cell("group"))
    explicit = MultiScaleExplicitNetwork([2, 4], normalization="group").double()
    options = settings(True, 1e-10, 300)
    layer = (
        MultiScaleDeepEquilibriumNetwork(cell, **options)
        if start == "vanilla"
        else MultiScaleSkipDeepEquilibriumNetwork(
            cell, explicit if start == "skip" else None, **options
        )
    )
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        together, solution = layer(x)
        alone = layer(x[:1])[0]
    assert solution.converged.all()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[:1], other, rtol=1e-6, atol=1e-8)


# One call is one function


def test_masks_are_fixed_through_a_solve_and_differ_between_calls():
    cell = conv_cell("batch", dropout=0.5)
    masks: list[Tensor] = []
    dropout = next(m for m in cell.modules() if isinstance(m, VariationalDropout))
    dropout.register_forward_hook(lambda _, given, out: masks.append(out == 0))
    layer = MultiScaleSkipDeepEquilibriumNetwork(cell, **settings(False, max_steps=5))
    x = torch.randn(8, 2, 4, 4)
    y, solution = layer(x)
    sum(scale.sum() for scale in y).backward()
    first = list(masks)
    assert len(first) == int(solution.nfe[0]) + 1
    dropped = [mask.all(dim=3).all(dim=2) for mask in first[1:]]
    assert all(torch.equal(mask, dropped[0]) for mask in dropped)
    masks.clear()
    layer(x)
    assert not torch.equal(masks[1].all(dim=3).all(dim=2), dropped[0])


def test_running_statistics_in_a_branch_move_once_per_call_and_are_used_in_evaluation():
    cell = dense_cell()
    norm = nn.BatchNorm1d(4)
    set_mapping(cell, 0, 0, nn.Sequential(norm))
    layer = MultiScaleDeepEquilibriumNetwork(cell, **settings(False, max_steps=10))
    x = torch.randn(8, 4)
    y, solution = layer(x)
    assert norm.num_batches_tracked == 1
    assert solution.nfe[0] > 2
    h = cell.branches[0](y[0], x)
    torch.testing.assert_close(norm.running_mean, 0.1 * h.mean(dim=0))
    layer.eval()(x)
    assert norm.num_batches_tracked == 1


# Coupled samples


def test_by_default_the_solves_are_those_that_the_cell_needs():
    coupled = MultiScaleDeepEquilibriumNetwork(conv_cell("batch"))
    alone = MultiScaleDeepEquilibriumNetwork(conv_cell("group"))
    for layer, per_sample in ((coupled, False), (alone, True)):
        assert layer.solver.per_sample == per_sample
        assert isinstance(layer.adjoint, Implicit)
        assert layer.adjoint.solver.per_sample == per_sample


@each(
    "solver, adjoint, key",
    [
        (Anderson(), JacobianFree(), "solver"),
        (Anderson(per_sample=False), Implicit(), "adjoint.solver"),
        (Anderson(per_sample=False), Implicit(solver=Anderson()), "adjoint.solver"),
    ],
)
def test_batch_statistics_with_samples_one_by_one_are_refused(solver, adjoint, key):
    with pytest.raises(ValueError, match=rf"BatchNorm2d 'branches.0.norm1'.*set {key}.per_sample"):
        MultiScaleDeepEquilibriumNetwork(conv_cell("batch"), solver=solver, adjoint=adjoint)
    MultiScaleDeepEquilibriumNetwork(conv_cell("group"), solver=solver, adjoint=adjoint)


# Wrong input


def test_the_error_for_a_cell_without_scales_names_what_to_use():
    for make in (MultiScaleDeepEquilibriumNetwork, MultiScaleSkipDeepEquilibriumNetwork):
        with pytest.raises(TypeError, match="DenseCell, which has no scales: give a MultiScaleC"):
            make(DenseCell(4))  # type: ignore[arg-type]


@each("missing", ["mappings", "row", "scales", "post_fusion", "everything"])
def test_parts_that_do_not_match_in_number_are_refused(missing):
    none = missing == "everything"
    branches = [] if none else [Injected(4), Injected(3)]
    mappings = [[nn.Identity(), nn.Linear(4, 3)], [nn.Linear(3, 4), nn.Identity()]]
    scales, ends = [[4], [3]], [nn.Identity(), nn.Identity()]
    for name, part in (("mappings", mappings), ("scales", scales), ("post_fusion", ends)):
        if missing == name:
            part.pop()
    if missing == "row":
        mappings[1].pop()
    with pytest.raises(ValueError, match=r"branches, but .* entries: give one per scale"):
        MultiScaleCell(branches, mappings, scales, ends)


def test_the_error_for_a_mapping_that_would_broadcast_names_it():
    cell = dense_cell()
    set_mapping(cell, 3, 0, nn.Identity())  # (B, 1) would be added to (B, 4)
    with pytest.raises(ValueError, match=r"mapping 4 → 1 makes \(1,\) per sample, but scale 1 is"):
        MultiScaleDeepEquilibriumNetwork(cell)(torch.randn(5, 4))


class Short(nn.Module):
    """A prediction that lacks scales."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x, x[:, :3])


@each("explicit", [Short(), nn.Identity()])
def test_the_error_for_a_prediction_of_other_scales_names_those_of_the_cell(explicit):
    layer = MultiScaleSkipDeepEquilibriumNetwork(dense_cell(), explicit)
    with pytest.raises(ValueError, match=r"the scales of the cell are \[\(4,\), \(3,\), \(2,\)"):
        layer(torch.randn(5, 4))


@each(
    "image, channels, times, cure",
    [
        ([3, 28, 28], [4, 4, 4, 4], 0, "28 × 28 cannot be halved 3 times.*multiples of 8"),
        ([3, 32, 20], [4, 4], 2, "32 × 20 cannot be halved 3 times"),
        ([1], [4, 4], 0, r"the data are \[1\]"),
        ([3, 32, 32], [4, 0], 0, "channels is"),
        ([3, 32, 32], [], 0, "channels is"),
        ([3, 32, 32], [4], -1, "downsample_times is -1"),
    ],
)
def test_sizes_that_make_no_scales_are_refused(image, channels, times, cure):
    with pytest.raises(ValueError, match=cure):
        image_scales(image, channels, times)


def test_group_norm_of_single_numbers_is_refused():
    with pytest.raises(ValueError, match=r"scale 2 is 7 channels of 1 × 1.*7 groups of one"):
        MultiScaleResidualCell([1, 2, 2], [7, 7], expansion=1, normalization="group")
