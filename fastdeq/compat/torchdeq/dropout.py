"""torchdeq's variational dropout: one mask until `reset_dropout`."""

from typing import ClassVar

import torch
from torch import Tensor, nn


class VariationalDropout(nn.Module):
    """Zero entries with probability p in training and scale the rest by 1 / (1 − p); the mask is
    drawn at the first call after `reset_dropout`, and kept.

    dropout: p in [0, 1).

    Raises: ValueError for another p.
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, but must be at least 0 and below 1")
        self.dropout = dropout
        self.mask: Tensor | None = None

    def mask_shape(self, x: Tensor) -> list[int]:
        """The shape of the mask, which is 1 along axes that share an entry."""
        return list(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        if self.mask is None:
            drawn = torch.zeros(self.mask_shape(x), dtype=x.dtype, device=x.device)
            self.mask = drawn.bernoulli_(1 - self.dropout) / (1 - self.dropout)
        return self.mask * x

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


class _Axes(VariationalDropout):
    """Drops along the channel axis or along the token axes of an input with `axes` token axes.

    token_first: whether the input is (B, tokens…, D) or (B, D, tokens…).
    """

    axes: ClassVar[int]
    drops_tokens: ClassVar[bool]

    def __init__(self, dropout: float = 0.5, token_first: bool = True) -> None:
        super().__init__(dropout)
        self.token_first = token_first

    def mask_shape(self, x: Tensor) -> list[int]:
        if x.ndim != self.axes + 2:
            raise ValueError(
                f"{type(self).__name__} takes inputs of {self.axes + 2} axes, but this one has "
                f"shape {tuple(x.shape)}"
            )
        channel = x.ndim - 1 if self.token_first else 1
        return [
            size if i == 0 or (i == channel) != self.drops_tokens else 1
            for i, size in enumerate(x.shape)
        ]


class VariationalDropout1d(_Axes):
    """Drops channels of (B, L, D), or of (B, D, L) with token_first=False."""

    axes, drops_tokens = 1, False


class VariationalDropout2d(_Axes):
    """Drops channels of (B, H, W, D), or of (B, D, H, W) with token_first=False."""

    axes, drops_tokens = 2, False


class VariationalDropout3d(_Axes):
    """Drops channels of (B, T, H, W, D), or of (B, D, T, H, W) with token_first=False."""

    axes, drops_tokens = 3, False


class VariationalDropToken1d(_Axes):
    """Drops tokens of (B, L, D), or of (B, D, L) with token_first=False."""

    axes, drops_tokens = 1, True


class VariationalDropToken2d(_Axes):
    """Drops tokens of (B, H, W, D), or of (B, D, H, W) with token_first=False."""

    axes, drops_tokens = 2, True


class VariationalDropToken3d(_Axes):
    """Drops tokens of (B, T, H, W, D), or of (B, D, T, H, W) with token_first=False."""

    axes, drops_tokens = 3, True


def reset_dropout(model: nn.Module) -> None:
    """Let every variational dropout of the model draw a new mask at its next call."""
    for module in model.modules():
        if isinstance(module, VariationalDropout):
            module.mask = None
