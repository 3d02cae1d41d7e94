"""A contractive cell of four dense scales, for the tests of multiscale layers."""

import torch
from torch import Tensor, nn

from fastdeq.nn import MultiScaleCell

WIDTHS = (4, 3, 2, 1)


class Injected(nn.Module):
    """tanh(W z / 2 + x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.state.weight, 0.4)

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        h: Tensor = self.state(z)
        return torch.tanh(h if x is None else h + x)


def scaled_linear(inputs: int, outputs: int) -> nn.Module:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, 0.2)
    return layer


def dense_cell(post_fusion: bool = False) -> MultiScaleCell:
    """Four scales of widths 4, 3, 2, 1, contractive: the first release's test."""
    return MultiScaleCell(
        [Injected(width) for width in WIDTHS],
        [
            [nn.Identity() if j == i else scaled_linear(WIDTHS[j], WIDTHS[i]) for i in range(4)]
            for j in range(4)
        ],
        [[width] for width in WIDTHS],
        [nn.Tanh() for _ in WIDTHS] if post_fusion else None,
    )
