"""precision="bf16": f in bfloat16, everything around it as without it."""

import pytest
import torch
from torch import Tensor, nn

from fastdeq import GMRES, Status
from fastdeq.adjoints import Implicit, JacobianFree, Phantom, Unrolled
from fastdeq.nn import (
    AbstractCellLayer,
    DeepEquilibriumNetwork,
    MultiScaleSkipDeepEquilibriumNetwork,
    SideBySideCell,
    SkipDeepEquilibriumNetwork,
    UnrolledNetwork,
)
from fastdeq.solvers import Anderson, LimitedMemoryBroydenSolver, Picard
from tests.cells import DenseTanh
from tests.loops import each
from tests.nn.layers import grad
from tests.nn.scales import image_cell

WIDTH = 16
LAYERS = {
    "zero": lambda cell, **kw: DeepEquilibriumNetwork(cell, **kw),
    "skip": lambda cell, **kw: SkipDeepEquilibriumNetwork(cell, nn.Linear(WIDTH, WIDTH), **kw),
    "skip reg": lambda cell, **kw: SkipDeepEquilibriumNetwork(cell, **kw),
    "stacked": lambda cell, **kw: SkipDeepEquilibriumNetwork(SideBySideCell([cell], [WIDTH]), **kw),
}


def built(
    name: str, precision: str | None, **settings: object
) -> tuple[AbstractCellLayer, DenseTanh]:
    torch.manual_seed(0)
    cell = DenseTanh(WIDTH, 0.7)
    return LAYERS[name](cell, precision=precision, **settings).float(), cell


def inputs() -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))


@each("adjoint", [Implicit(solver=GMRES(tol=1e-3)), JacobianFree(), Phantom(), Unrolled()])
@each("name", LAYERS)
def test_f_computes_in_bfloat16_while_the_state_and_its_record_stay_float32(name, adjoint):
    layer, cell = built(name, "bf16", adjoint=adjoint, solver=Anderson(tol=5e-3))
    products, states = set(), set()
    cell.state.register_forward_hook(lambda _, args, y: products.add(y.dtype))
    cell.register_forward_hook(lambda _, args, y: states.add(args[0].dtype))
    value, solution = layer(inputs(), jacobian_loss=True, trace="states")
    assert (products, states) == ({torch.bfloat16}, {torch.float32})
    assert solution.trace is not None
    assert isinstance(solution.z0, Tensor)
    kept = (value, solution.z0, solution.defect, solution.residual, solution.jacobian_loss)
    assert {each.dtype for each in (*kept, solution.trace.states)} == {torch.float32}
    assert bool(solution.converged.all())
    if layer.initializer.predicts:
        prediction = layer.explicit(inputs())
        assert isinstance(prediction, Tensor)
        assert prediction.dtype == torch.float32


@each("adjoint", [Implicit(solver=GMRES(tol=1e-3)), JacobianFree(), Phantom(), Unrolled()])
@each("name", LAYERS)
def test_gradients_point_where_those_of_float32_do(name, adjoint):
    found = []
    for precision in (None, "bf16"):
        layer, cell = built(name, precision, adjoint=adjoint, solver=Anderson(tol=5e-3))
        layer(inputs())[0].square().sum().backward()
        assert {grad(p).dtype for p in cell.parameters()} == {torch.float32}
        found.append(torch.cat([grad(p).flatten() for p in cell.parameters()]))
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99


def test_several_scales_with_convolutions_are_solved_in_bfloat16():
    found = []
    for precision in (None, "bf16"):
        torch.manual_seed(0)
        cell = image_cell()
        layer = MultiScaleSkipDeepEquilibriumNetwork(cell, precision=precision)
        value, solution = layer(torch.randn(3, 4, 8, 8))
        sum(scale.square().sum() for scale in value).backward()
        assert {scale.dtype for scale in (*value, *solution.z0)} == {torch.float32}
        found.append(torch.cat([grad(p).flatten() for p in cell.parameters()]))
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99
    assert not torch.equal(found[0], found[1])


def test_what_surrounds_the_layer_does_not_change_f_nor_f_what_surrounds_it():
    layer, _ = built("zero", "bf16", solver=Picard(tol=5e-3))
    alone, _ = layer(inputs())
    with torch.autocast("cpu", torch.float16):
        inside, _ = layer(inputs())
        assert torch.get_autocast_dtype("cpu") == torch.float16
    assert torch.equal(inside, alone)
    assert not torch.is_autocast_enabled("cpu")


def test_a_tolerance_below_the_rounding_of_bfloat16_is_reported_as_not_reached():
    # bfloat16 has 8 bits: f is known to 2⁻⁹ = 0.2 % at best.
    for tol, reached in ((5e-3, True), (1e-5, False)):
        layer, _ = built("zero", "bf16", solver=LimitedMemoryBroydenSolver(tol=tol, max_steps=30))
        value, solution = layer(inputs())
        assert bool(solution.converged.all()) == reached
        assert not bool((solution.status == Status.DIVERGED).any())
        assert float(solution.relative_residual.max()) < 1e-2
        assert bool(torch.isfinite(value).all())


def test_an_unrolled_network_takes_the_same_setting():
    network = UnrolledNetwork(DenseTanh(WIDTH, 0.7), steps=2, precision="bf16").float()
    value, _ = network(inputs())
    network.precision = None
    assert value.dtype == torch.float32
    assert not torch.equal(value, network(inputs())[0])


def test_another_precision_is_refused_and_a_set_one_is_shown():
    with pytest.raises(ValueError, match="precision is 'fp16', but must be 'bf16' or None"):
        built("zero", "fp16")
    assert "precision=bf16" in repr(built("zero", "bf16")[0])
    assert "precision" not in repr(built("zero", None)[0])
