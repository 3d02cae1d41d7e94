"""Networks with several equilibria: chains, and branches side by side."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdeq import DeepEquilibriumNetwork, DEQChain, SkipDeepEquilibriumNetwork, Status
from fastdeq.nn import UnrolledNetwork, WidthStackedDEQ
from fastdeq.regularizers import residual_loss, skip_loss
from fastdeq.solvers import Picard
from tests.cells import EXACT, TIGHT, DenseTanh
from tests.loops import each


def deq(width: int, **options: Any) -> DeepEquilibriumNetwork:
    return DeepEquilibriumNetwork(
        DenseTanh(width, 0.6), **{"solver": TIGHT, "adjoint": EXACT} | options
    )


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=torch.float64)


def chain(**options: Any) -> DEQChain:
    return DEQChain(first=deq(4, **options), middle=linear(4, 3), second=deq(3, **options))


def stacked() -> WidthStackedDEQ:
    return WidthStackedDEQ(
        [deq(4), deq(3)],
        pre=[linear(4, 4), linear(4, 3)],
        post=[linear(4, 2), linear(3, 5)],
        final=linear(7, 6),
    )


def inputs() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def test_a_chain_of_several_equilibria_is_the_composition_of_its_layers():
    model, x = chain(), inputs()
    first, middle, second = model.children()
    y, solution = model(x)
    z, one = first(x)
    other_y, two = second(middle(z))
    torch.testing.assert_close(y, other_y, rtol=1e-12, atol=1e-12)
    leaves = list(model.parameters())
    got, expected = (torch.autograd.grad(out.square().sum(), leaves) for out in (y, other_y))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert len(model.equilibria) == 2
    assert torch.equal(solution.nfe, one.nfe + two.nfe)


def test_branches_are_combined_and_mapped():
    model, x = stacked(), inputs()
    y, solution = model(x)
    z = [layer(pre(x))[0] for layer, pre in zip(model.equilibria, model.pre, strict=True)]
    outputs = [post(each) for post, each in zip(model.post, z, strict=True)]
    torch.testing.assert_close(y, model.final(torch.cat(outputs, dim=1)), rtol=1e-12, atol=1e-12)
    assert [tuple(part.value.shape) for part in solution.parts] == [(5, 4), (5, 3)]
    assert solution.converged.all()


def test_branches_may_be_combined_by_a_module_of_their_own():
    class Sum(nn.Module):
        def forward(self, *outputs: Tensor) -> Tensor:
            return torch.stack(outputs).sum(dim=0)

    model, x = WidthStackedDEQ([deq(4), deq(4)], combine=Sum()), inputs()
    parts = [layer(x)[0] for layer in model.equilibria]
    torch.testing.assert_close(model(x)[0], parts[0] + parts[1], rtol=1e-12, atol=1e-12)


@each("make", [chain, stacked])
def test_the_joined_solution_is_of_all_equilibria(make):
    model = make()
    y, solution = model(inputs(), jacobian_loss=True)
    parts = solution.parts
    assert [scale.shape for scale in solution.value] == [part.value.shape for part in parts]
    expected = sum(part.residual.square() for part in parts) ** 0.5
    torch.testing.assert_close(solution.residual, expected)
    torch.testing.assert_close(solution.residual, solution.defect.norm(dim=1))
    assert torch.equal(
        solution.relative_residual, torch.maximum(*(part.relative_residual for part in parts))
    )
    losses = [(skip_loss(each), residual_loss(each), each.jacobian_loss) for each in parts]
    torch.testing.assert_close(skip_loss(solution), losses[0][0] + losses[1][0])
    torch.testing.assert_close(solution.jacobian_loss, losses[0][2] + losses[1][2])
    assert solution.seconds == pytest.approx(sum(part.seconds for part in parts))
    before = solution.backward.stats
    assert before is None
    y.sum().backward()
    nfe = sum(part.backward.stats.nfe for part in parts)
    assert torch.equal(solution.backward.stats.nfe, nfe)


def test_a_sample_has_the_gravest_status_of_its_equilibria():
    model = DEQChain(deq(4), deq(4, solver=Picard(tol=1e-12, max_steps=2)))
    _, solution = model(inputs())
    assert (solution.parts[0].status == Status.CONVERGED).all()
    assert (solution.status == Status.STEP_LIMIT).all()


def test_every_equilibrium_of_a_chain_starts_where_its_name_says():
    model, x = chain(), inputs()
    _, cold = model(x)
    starts = {"second": cold.parts[1].value.detach()}
    _, warm = model(x, z0=starts)
    assert torch.equal(warm.parts[0].nfe, cold.parts[0].nfe)
    assert (warm.parts[1].nfe < cold.parts[1].nfe).all()
    for z0 in (torch.zeros(5, 3), {"third": starts["second"]}):
        with pytest.raises(ValueError, match=r"dictionary of their names \(first, second\)"):
            model(x, z0=z0)
    _, warm = stacked()(x, z0=[None, torch.ones(5, 3, dtype=torch.float64)])
    assert warm.parts[1].z0.all()


def test_options_reach_every_equilibrium_and_a_prediction_needs_all_to_predict():
    x = inputs()
    _, solution = chain()(x, depth=2, trace="residuals")
    assert (solution.nfe == 4).all()
    _, solution = chain()(x, trace="residuals", states=[1])
    assert all(part.trace is not None and len(part.states) == 1 for part in solution.parts)
    skips: list[Any] = [SkipDeepEquilibriumNetwork(DenseTanh(4, 0.6)) for _ in range(2)]
    model = DEQChain(*skips)
    assert model.predicts
    assert torch.equal(model.explicit(x), skips[1].explicit(skips[0].explicit(x)))
    assert WidthStackedDEQ(skips).explicit(x).shape == (5, 8)
    mixed = DEQChain(skips[0], deq(4))
    assert not mixed.predicts
    with pytest.raises(ValueError, match="has no explicit prediction"):
        mixed.explicit(x)


def test_a_network_of_several_may_be_a_layer_of_a_chain():
    model = DEQChain(stacked=stacked(), head=linear(6, 2))
    y, solution = model(inputs())
    assert y.shape == (5, 2)
    assert len(solution.parts) == len(model.equilibria) == 2
    with pytest.raises(ValueError, match="has 2 equilibria: use `equilibria`"):
        _ = model.equilibrium


def test_a_baseline_may_be_one_of_several():
    model = DEQChain(deq(4), UnrolledNetwork(DenseTanh(4, 0.6), steps=3))
    _, solution = model(inputs())
    assert (solution.status == Status.NOT_SOLVED).all()


@each(
    "options, message",
    [
        ({"deqs": []}, "0 equilibria"),
        ({"deqs": [deq(4)], "pre": []}, "1 equilibria and 0 networks in pre"),
        ({"deqs": [deq(4)], "post": [nn.Identity()] * 2}, "1 equilibria and 2 networks in post"),
    ],
)
def test_other_numbers_of_networks_than_of_equilibria_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WidthStackedDEQ(**options)


def test_a_branch_that_does_not_solve_is_refused():
    with pytest.raises(TypeError, match="a branch is a Linear: give an equilibrium layer"):
        WidthStackedDEQ([linear(4, 4)])  # type: ignore[list-item]
