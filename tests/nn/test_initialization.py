"""How weights are drawn: exact distributions, seeds, parametrized layers, errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdeq
from fastdeq.nn import DenseCell, Initialization, initialize, weight_norm
from tests.loops import each

LAYERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(300, 200),
    "convolution": lambda: nn.Conv2d(30, 60, 3),
    "one dimension": lambda: nn.Conv1d(60, 90, 5),
}
FANS = {"linear": (300, 200), "convolution": (270, 540), "one dimension": (300, 450)}


def initialized(layer: nn.Module, initialization: Any) -> Any:
    initialize(layer, initialization)
    return layer


def assert_uniform(draws: Tensor, bound: float) -> None:
    # n draws: the largest falls short of the bound by more than 12 bound / n with p = e^-12; the
    # variance, a mean of n numbers of relative deviation 2/√5, is within 5 deviations.
    n = draws.numel()
    assert bound * (1 - 12 / n) < draws.abs().max() <= bound * (1 + 1e-6)
    assert draws.square().mean().item() == pytest.approx(bound**2 / 3, rel=5 / math.sqrt(n))


def assert_normal(draws: Tensor, std: float) -> None:
    n = draws.numel()
    assert draws.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
    assert abs(draws.mean().item()) < 5 * std / math.sqrt(n)
    # A quarter of a uniform distribution of this spread lies beyond 0.75 √3 std, of a normal 0.194.
    beyond = (draws.abs() > 0.75 * math.sqrt(3) * std).float().mean().item()
    assert beyond == pytest.approx(0.194, abs=5 * 0.4 / math.sqrt(n))


@each("kind", LAYERS)
def test_torch_is_the_distribution_of_a_new_layer(kind):
    torch.manual_seed(0)
    bound = 1 / math.sqrt(FANS[kind][0])
    new = LAYERS[kind]()
    for layer in (new, initialized(LAYERS[kind](), "torch")):
        assert_uniform(layer.weight, bound)
        assert_uniform(layer.bias, bound)


@each("kind", LAYERS)
def test_glorot_has_its_bound_and_zero_biases(kind):
    torch.manual_seed(0)
    layer = initialized(LAYERS[kind](), "glorot")
    assert_uniform(layer.weight, math.sqrt(6 / sum(FANS[kind])))
    assert not layer.bias.any()


@each("kind", LAYERS)
def test_normal_has_the_published_spread_and_zero_biases(kind):
    torch.manual_seed(0)
    layer = initialized(LAYERS[kind](), "normal")
    assert_normal(layer.weight, 0.01)
    assert not layer.bias.any()


def test_a_seed_fixes_the_weights_and_another_one_changes_them():
    def drawn(seed: int, initialization: str) -> Any:
        torch.manual_seed(seed)
        return initialized(nn.Conv2d(3, 4, 3), initialization).weight

    for initialization in ("torch", "glorot", "normal"):
        assert torch.equal(drawn(1, initialization), drawn(1, initialization))
        assert not torch.equal(drawn(1, initialization), drawn(2, initialization))


@each("initialization", ["torch", "glorot", "normal"])
def test_a_weight_normalized_layer_gets_the_drawn_weight(initialization):
    torch.manual_seed(0)
    plain = initialized(nn.Conv2d(30, 60, 3), initialization)
    torch.manual_seed(0)
    normalized = initialized(weight_norm(nn.Conv2d(30, 60, 3)), initialization)
    torch.testing.assert_close(normalized.weight, plain.weight)
    assert torch.equal(normalized.bias, plain.bias)
    magnitude = normalized.parametrizations.weight.original0
    torch.testing.assert_close(magnitude.flatten(), plain.weight.flatten(1).norm(dim=1))
    normalized(torch.randn(2, 30, 5, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in normalized.parameters())


def test_other_parameters_keep_their_values_and_all_still_require_gradients():
    norm = nn.LayerNorm(4)
    nn.init.constant_(norm.weight, 3.0)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 2, bias=False))
    before = dict(model.named_parameters())
    initialize(model, "glorot")
    assert torch.equal(norm.weight, torch.full((4,), 3.0))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_not_an_initialization_is_refused_in_one_sentence():
    with pytest.raises(
        ValueError, match=r"^initialization is 'xavier', but must be one of 'torch'"
    ):
        initialized(nn.Conv2d(3, 4, 3), "xavier")


def chain(initialization: Initialization | None = None) -> Any:
    torch.manual_seed(0)
    equilibrium = fastdeq.DeepEquilibriumNetwork(DenseCell(4))
    return fastdeq.DEQChain(
        nn.Linear(9, 4), equilibrium, nn.Linear(4, 2), initialization=initialization
    )


def test_a_chain_draws_all_its_weights_where_an_initialization_is_given_and_none_elsewhere():
    torch.manual_seed(0)
    as_made = [nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(9, 4)]
    plain = chain()
    cell = plain.equilibrium.cell
    found = [cell.state, cell.injection, plain.get_submodule("0")]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(as_made, found, strict=True))
    drawn = chain(initialization="glorot")
    assert [tuple(p.shape) for p in drawn.parameters()] == [
        tuple(p.shape) for p in plain.parameters()
    ]
    for layer in drawn.modules():
        if isinstance(layer, nn.Linear):
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert 0.5 * bound < layer.weight.abs().max() <= bound
            assert layer.bias is None or not layer.bias.any()
