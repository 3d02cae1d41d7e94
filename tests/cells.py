"""The dense cell that tests of layers and of calls share, and solves tight enough to compare."""

import torch
from torch import Tensor, nn

from fastdeq.adjoints import Implicit
from fastdeq.krylov import GMRES
from fastdeq.solvers import LimitedMemoryBroydenSolver

TIGHT = LimitedMemoryBroydenSolver(tol=1e-12, max_steps=100)
EXACT = Implicit(solver=GMRES(tol=1e-12))


class DenseTanh(nn.Module):
    """f(z, x) = tanh(extra(W z) + U x) with ‖W‖₂ = gain, in float64; counts its calls."""

    def __init__(self, width: int, gain: float, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.state = nn.Linear(width, width, dtype=torch.float64)
        self.injection = nn.Linear(width, width, bias=False, dtype=torch.float64)
        self.extra = nn.Identity() if extra is None else extra
        nn.init.orthogonal_(self.state.weight, gain)
        self.calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.extra(self.state(z)) + self.injection(x))
