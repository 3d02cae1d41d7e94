"""The convolutional blocks of multiscale networks (Bai et al. 2020, arXiv
2006.08656, §3 and appendix; sizes and initialization of Pal et al. 2022, arXiv 2201.12240).

All take and return images (B, C, H, W).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastdeq.nn.dropout import VariationalDropout
from fastdeq.nn.initialization import STD
from fastdeq.nn.weight_norm import weight_norm as normalize_weights

Normalization: TypeAlias = Literal["batch", "group"]
"""`batch`: the statistics of the batch, in evaluation too: the samples of a batch are coupled, in
evaluation as in training. `group`: per sample."""

_GROUPS, _GROUPS_AFTER_FUSION = 8, 4


def check_channels(**lists: Sequence[int]) -> None:
    """Raises: ValueError for what is not a list of whole numbers of at least 1, with its name."""
    for name, numbers in lists.items():
        if (
            not isinstance(numbers, Sequence)
            or not numbers
            or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in numbers)
        ):
            raise ValueError(
                f"{name} is {numbers!r}, but must list whole numbers of at least 1, one per scale"
            )


def convolution(
    inputs: int, outputs: int, size: int = 3, *, stride: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A `size` × `size` convolution, weights ~ N(0, 0.01²), that keeps height and width (divides
    even ones by the stride)."""
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)
    nn.init.normal_(layer.weight, std=STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def normalization_layer(kind: Normalization, channels: int, groups: int = _GROUPS) -> nn.Module:
    """Normalization of (B, channels, H, W), with affine parameters.

    groups: of group norm; where they do not divide the channels, the largest smaller number that
        does.

    Raises: ValueError for another kind.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    if kind == "group":
        return nn.GroupNorm(group_count(channels, groups), channels)
    raise ValueError(f"normalization is {kind!r}, but must be 'batch' or 'group'")


def group_count(channels: int, groups: int = _GROUPS) -> int:
    """The largest divisor of `channels` that is at most `groups`."""
    return next(n for n in range(min(groups, channels), 0, -1) if channels % n == 0)


def convolved(
    inputs: int, outputs: int, size: int = 3, *, stride: int = 1, kind: Normalization = "batch"
) -> nn.Sequential:
    """Convolution, normalization, ReLU."""
    return nn.Sequential(
        convolution(inputs, outputs, size, stride=stride),
        normalization_layer(kind, outputs),
        nn.ReLU(),
    )


class ResidualBlock(nn.Module):
    """One branch of a multiscale cell:

        h = norm₂(dropout(K₂ relu(norm₁(K₁ z))) + x),    y = norm₃(relu(h + z)).

    channels: of z, x and y. expansion: K₁ maps to expansion · channels, K₂ back. weight_norm: of K₁
    and K₂. dropout: p of `VariationalDropout`. Called as block(z, x), or block(z) without an
    injection.

    Raises: ValueError for an expansion below 1, and for an injection of another shape than z.
    """

    def __init__(
        self,
        channels: int,
        expansion: int,
        *,
        normalization: Normalization = "batch",
        weight_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if expansion < 1:
            raise ValueError(f"expansion is {expansion}, but must be at least 1")
        wide = expansion * channels
        self.widen = convolution(channels, wide)
        self.norm1 = normalization_layer(normalization, wide)
        self.narrow = convolution(wide, channels)
        self.dropout = VariationalDropout(dropout)
        self.norm2 = normalization_layer(normalization, channels)
        self.norm3 = normalization_layer(normalization, channels)
        if weight_norm:
            normalize_weights(self)

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        h = self.dropout(self.narrow(torch.relu(self.norm1(self.widen(z)))))
        if x is not None:
            if x.shape != h.shape:  # broadcasting would hide it
                raise ValueError(
                    f"the injection has shape {tuple(x.shape)}, but its branch {tuple(h.shape)}: "
                    "let the stem make images of the first scale's shape"
                )
            h = h + x
        y: Tensor = self.norm3(torch.relu(self.norm2(h) + z))
        return y


class Bottleneck(nn.Module):
    """y = relu(K₃ relu(K₂ relu(K₁ z)) + S z), every K and S followed by batch norm with running
    statistics; K₁ and K₃ are 1 × 1, K₂ is 3 × 3.

    inputs: channels of z. hidden: channels after K₁ and K₂; y has `expansion` times as many. S is
    the identity where z has the channels of y, else a 1 × 1 convolution.
    """

    def __init__(self, inputs: int, hidden: int, expansion: int = 4) -> None:
        super().__init__()
        outputs = expansion * hidden
        self.layers = nn.Sequential(
            *(convolution(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU()),
            *(convolution(hidden, hidden), nn.BatchNorm2d(hidden), nn.ReLU()),
            *(convolution(hidden, outputs, 1), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(convolution(inputs, outputs, 1), nn.BatchNorm2d(outputs))
        )

    def forward(self, z: Tensor) -> Tensor:
        return torch.relu(self.layers(z) + self.shortcut(z))


def downsample(
    inputs: int, outputs: int, steps: int, normalization: Normalization = "batch"
) -> nn.Sequential:
    """Height and width halved `steps` times by convolutions of stride 2, each followed by
    normalization and ReLU.

    Channels double at every step where that ends at `outputs`; else they change in the last one.
    """
    doubles = inputs * 2**steps == outputs
    widths = [inputs * 2**step if doubles else inputs for step in range(steps)] + [outputs]
    return nn.Sequential(
        *(
            convolved(narrow, wide, stride=2, kind=normalization)
            for narrow, wide in pairwise(widths)
        )
    )


def upsample(
    inputs: int, outputs: int, steps: int, normalization: Normalization = "batch"
) -> nn.Sequential:
    """Convolution, normalization and ReLU on the coarse grid, then height and width times 2^steps,
    every value repeated."""
    return nn.Sequential(
        *convolved(inputs, outputs, kind=normalization),
        nn.Upsample(scale_factor=2**steps, mode="nearest"),
    )


def post_fusion(
    channels: int, normalization: Normalization = "batch", weight_norm: bool = False
) -> nn.Sequential:
    """The end of a branch after fusion: 1 × 1 convolution, ReLU, normalization (4 groups)."""
    mixed = convolution(channels, channels, 1)
    if weight_norm:
        normalize_weights(mixed)
    return nn.Sequential(
        mixed, nn.ReLU(), normalization_layer(normalization, channels, _GROUPS_AFTER_FUSION)
    )
