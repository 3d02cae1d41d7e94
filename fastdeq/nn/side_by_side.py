"""Several cells side by side, as one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SideBySideCell(nn.Module):
    """f(z, x) = (f₁(z₁, x₁), …, fₙ(zₙ, xₙ)), state and input cut into n parts along their features.

    Solved as one system whose Jacobian has one block per cell, with one stopping test.

    cells: f₁ … fₙ. widths: features of each part; z and x are (B, sum of widths, ...).

    Raises: ValueError where there is not one width per cell, and, when called, for an input of
    another width.
    """

    def __init__(self, cells: Sequence[nn.Module], widths: Sequence[int]) -> None:
        super().__init__()
        if len(cells) != len(widths) or not cells:
            raise ValueError(
                f"there are {len(cells)} cells and {len(widths)} widths: give one each"
            )
        self.cells = nn.ModuleList(cells)
        self.widths = list(widths)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        if x.shape[1] != sum(self.widths):
            raise ValueError(
                f"the input has {x.shape[1]} features, but the branches take {self.widths}: let "
                f"the layer before make {sum(self.widths)}"
            )
        parts = zip(z.split(self.widths, 1), x.split(self.widths, 1), strict=True)
        return torch.cat([cell(*part) for cell, part in zip(self.cells, parts, strict=True)], dim=1)
