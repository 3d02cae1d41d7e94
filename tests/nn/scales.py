"""Contractive cells, of four dense scales and of convolutions, for the tests of layers."""

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


class Convolved(nn.Module):
    """tanh(K z + x), (B, channels, H, W)."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.convolution = small_convolution(channels, channels)

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        h: Tensor = self.convolution(z)
        return torch.tanh(h if x is None else h + x)


def small_convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    nn.init.normal_(layer.weight, std=0.03)
    return layer


def image_cell() -> MultiScaleCell:
    """Two scales, (4, 8, 8) and (8, 4, 4)."""
    up = nn.Sequential(small_convolution(8, 4), nn.Upsample(scale_factor=2))
    return MultiScaleCell(
        [Convolved(4), Convolved(8)],
        [[nn.Identity(), small_convolution(4, 8, stride=2)], [up, nn.Identity()]],
        [[4, 8, 8], [8, 4, 4]],
    )
