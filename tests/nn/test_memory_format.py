"""channels_last: convolutional layers keep it, without copies, with the same answers."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastdeq._fixed_point import flat_map
from fastdeq.adjoints import Implicit, JacobianFree, Phantom, Unrolled
from fastdeq.flatten import Layout, is_channels_last, scales_of
from fastdeq.krylov import GMRES
from fastdeq.nn import (
    DeepEquilibriumNetwork,
    DEQChain,
    MultiScaleCell,
    MultiScaleDeepEquilibriumNetwork,
    MultiScaleExplicitNetwork,
    MultiScaleResidualCell,
    MultiScaleSkipDeepEquilibriumNetwork,
    SkipDeepEquilibriumNetwork,
)
from fastdeq.nn.call import CellCall
from fastdeq.solvers import Picard
from tests.loops import each
from tests.nn.scales import Convolved, image_cell

IMAGE, CHANNELS = (3, 8, 8), (4, 8)
SOLVER = Picard(tol=1e-12, max_steps=40, per_sample=False)
ADJOINT = Implicit(solver=GMRES(tol=1e-12, max_steps=40, per_sample=False))


def published_cell() -> MultiScaleCell:
    return MultiScaleResidualCell(IMAGE, CHANNELS, expansion=2, dropout=0.1)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "one scale": lambda **kw: DeepEquilibriumNetwork(Convolved(), **kw),
    "one scale, skip reg": lambda **kw: SkipDeepEquilibriumNetwork(Convolved(), **kw),
    "scales": lambda **kw: MultiScaleDeepEquilibriumNetwork(image_cell(), **kw),
    "scales, skip": lambda **kw: MultiScaleSkipDeepEquilibriumNetwork(
        image_cell(), MultiScaleExplicitNetwork(CHANNELS), **kw
    ),
    "scales, published": lambda **kw: MultiScaleDeepEquilibriumNetwork(published_cell(), **kw),
}
CONTRACTIONS = [name for name in LAYERS if name != "scales, published"]


def chain(name: str, adjoint: Any = ADJOINT, solver: Any = SOLVER) -> DEQChain:
    """A model of one convolution and a layer, the same weights at every call."""
    torch.manual_seed(0)
    stem = nn.Conv2d(IMAGE[0], CHANNELS[0], 3, padding=1)
    return DEQChain(stem=stem, deq=LAYERS[name](solver=solver, adjoint=adjoint)).double()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(1)).double()


def as_channels_last(module: nn.Module) -> Any:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@each("name", LAYERS)
def test_a_channels_last_model_keeps_the_format_in_every_evaluation(name):
    model = as_channels_last(chain(name))
    seen: list[Tensor] = []

    def look(cell: nn.Module, inputs: Any, output: Any) -> None:
        seen.extend((*scales_of(inputs[0]), inputs[1], *scales_of(output)))

    model.equilibrium.cell.register_forward_hook(look)
    value, solution = model(images())
    assert len(seen) > 10
    assert all(map(is_channels_last, seen))
    assert all(map(is_channels_last, scales_of(value)))
    assert all(map(is_channels_last, scales_of(solution.z0)))


def answer(model: DEQChain) -> list[Tensor]:
    """The state, its residual, and the gradients of all weights."""
    value, solution = model(images())
    torch.autograd.backward([scale.square().sum() for scale in scales_of(value)])
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*scales_of(value), solution.residual.detach(), *gradients]


@each("adjoint", [ADJOINT, JacobianFree(), Phantom(), Unrolled()])
@each("name", CONTRACTIONS)
def test_the_answers_are_those_of_the_contiguous_model(name, adjoint):
    wanted = answer(chain(name, adjoint))
    found = answer(as_channels_last(chain(name, adjoint)))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def copies(run: Callable[[], Any]) -> Counter[str]:
    """How often data are copied, whatever operation does it, kernels of convolutions included."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    names = [event.name for event in seen.events()]
    return Counter(name for name in names if name in ("aten::copy_", "aten::cat"))


def test_an_evaluation_of_one_scale_copies_nothing_and_of_several_concatenates_once():
    for cell, shapes in ((Convolved(), [(4, 8, 8)]), (published_cell(), [(4, 8, 8), (8, 4, 4)])):
        cell = as_channels_last(cell.eval())
        x = torch.randn(3, 4, 8, 8).contiguous(memory_format=torch.channels_last)
        z = tuple(torch.randn(3, *s).contiguous(memory_format=torch.channels_last) for s in shapes)
        z0 = z[0] if len(z) == 1 else z
        layout = Layout.of(z0)
        f, flat = flat_map(CellCall(cell, x), layout), layout.flatten(z0)
        with torch.no_grad():
            found = copies(lambda f=f, flat=flat: f(flat))  # type: ignore[misc]
        if len(z) == 1:
            assert not found
        else:  # a part of the flat state has gaps between its samples: a convolution closes them
            assert found["aten::cat"] == 1
            assert found["aten::copy_"] <= len(z)


@each("name", ["one scale", "scales, published"])
def test_a_step_of_either_solve_copies_no_more_in_channels_last_than_contiguous(name):
    def of_training(kind: torch.memory_format, steps: int) -> Counter[str]:
        few = Picard(tol=1e-30, max_steps=steps, per_sample=False)
        model = chain(name, Implicit(solver=few), few).float()
        model.to(memory_format=kind)  # type: ignore[call-overload]
        x = images().float().contiguous(memory_format=kind)

        def run() -> None:
            value, _ = model(x)
            torch.autograd.backward([scale.sum() for scale in scales_of(value)])

        return copies(run)

    contiguous, channels_last = (
        of_training(kind, 8) - of_training(kind, 4)
        for kind in (torch.contiguous_format, torch.channels_last)
    )
    assert channels_last["aten::cat"] == contiguous["aten::cat"]
    assert channels_last["aten::copy_"] <= contiguous["aten::copy_"]


def test_a_cell_that_returns_the_other_format_is_solved_for():
    x = images()
    wanted = 0.5 * x / (1 - 0.5 * 0.5)

    def solved(z0: Tensor, kind: torch.memory_format) -> Tensor:
        layout = Layout.of(z0)
        f = flat_map(lambda z: (0.5 * 0.5 * z + 0.5 * x).contiguous(memory_format=kind), layout)
        z = layout.flatten(z0)
        for _ in range(40):
            z = f(z)
        found = layout.unflatten(z)
        assert isinstance(found, Tensor)
        return found

    for start in (torch.contiguous_format, torch.channels_last):
        for kind in (torch.contiguous_format, torch.channels_last):
            z0 = torch.zeros_like(x).contiguous(memory_format=start)
            torch.testing.assert_close(solved(z0, kind), wanted)


def test_weights_of_a_contiguous_model_are_loaded_and_stay_in_channels_last():
    saved = chain("scales").state_dict()
    model = as_channels_last(chain("scales"))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.load_state_dict(saved)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved[name])
    assert is_channels_last(model.equilibrium.cell.branches[0].convolution.weight)
