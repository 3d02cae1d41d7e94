"""Weights of bounded norm: what makes a dense cell a contraction for certain."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastdeq.settings import check_value


class _Clipped(nn.Module):
    """W ↦ W · min(1, most / ‖W‖₂), with the norm of a singular value decomposition: the power
    method would bound it from below."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def forward(self, weight: Tensor) -> Tensor:
        norm = torch.linalg.matrix_norm(weight, ord=2)
        clipped: Tensor = weight * (self.most / norm.clamp(min=self.most))
        return clipped

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def clip_norm(layer: nn.Linear, most: float) -> None:
    """Keep ‖W‖₂ ≤ most for the weight W of a linear layer, in place, by a parametrization."""
    parametrize.register_parametrization(layer, "weight", _Clipped(most))


def check_lipschitz(lipschitz: float | None) -> None:
    """Raises: TypeError or ValueError for a bound that is not between 0 and 1, or None."""
    check_value("lipschitz", lipschitz, float | None, {"above": 0})
    if lipschitz is not None and lipschitz >= 1:
        raise ValueError(
            f"lipschitz is {lipschitz!r}, but must be below 1: f is a contraction only then"
        )
