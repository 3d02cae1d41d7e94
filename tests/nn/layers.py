"""A dense layer with each kind of start, for the tests of layers."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdeq import DeepEquilibriumNetwork, SkipDeepEquilibriumNetwork
from fastdeq.nn import VariationalDropout
from tests.cells import DenseTanh
from tests.loops import each

WIDTH = 4


class Dense(DenseTanh):
    """A contraction."""

    def __init__(self, extra: nn.Module | None = None) -> None:
        super().__init__(WIDTH, 0.7, extra)


def dense_input(batch: int = 3) -> Tensor:
    return torch.randn(batch, WIDTH, dtype=torch.float64)


def explicit_network() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, dtype=torch.float64)


def grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad.clone()


def build(start: str, cell: nn.Module, **options: Any) -> DeepEquilibriumNetwork:
    if start == "vanilla":
        return DeepEquilibriumNetwork(cell, **options)
    explicit = explicit_network() if start == "explicit" else None
    return SkipDeepEquilibriumNetwork(cell, explicit, **options)


every_start = each("start", ["vanilla", "explicit", "skip_reg"])


def recorded_masks(dropout: VariationalDropout) -> list[Tensor]:
    """Filled at every evaluation; with p = 0.5 the ratio is exactly 0 or 2."""
    masks: list[Tensor] = []
    dropout.register_forward_hook(lambda _, given, out: masks.append((out / given[0]).detach()))
    return masks
