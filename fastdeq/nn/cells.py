"""Ready-made cells f(z, x)."""

from typing import Literal

import torch
from torch import Tensor, nn

from fastdeq.nn.lipschitz import check_lipschitz, clip_norm


class DenseCell(nn.Module):
    """f(z, x) = relu(W z) + relu(U x) without biases: the cell of the fully connected MNIST
    experiment (arXiv 2201.12240, §4.1).

    width: features of z and of x, both (B, width). 2 · width² parameters.
    lipschitz: L below 1: W is scaled down to ‖W‖₂ ≤ L where it is above, so that f is a contraction
        with one equilibrium, and `solution.error_bound` is known. Costs a singular value
        decomposition of W per call. None: W is free.

    Raises: ValueError for a width below 1, and for a bound that is not between 0 and 1.
    """

    def __init__(self, width: int, lipschitz: float | None = None) -> None:
        super().__init__()
        _require_sizes(width=width)
        check_lipschitz(lipschitz)
        self.state = nn.Linear(width, width, bias=False)
        self.injection = nn.Linear(width, width, bias=False)
        self.lipschitz = lipschitz
        if lipschitz is not None:
            clip_norm(self.state, lipschitz)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.relu(self.state(z)) + torch.relu(self.injection(x))


class TwoLayerCell(nn.Module):
    """f(z, x) = W₂ σ(W₁ z + U x + b) + b₂: the cell of the first release's polynomial fitting (σ
    relu) and of its picture of the dynamics (σ tanh, no b₂) (arXiv 2201.12240).

    width: features of z and of x, both (B, width). hidden: rows of W₁ and U. activation: σ.
    output_bias: whether there is b₂. lipschitz: L, as in `DenseCell`, with ‖W₁‖₂ and ‖W₂‖₂ at most
        √L.

    Raises: ValueError for another activation, for sizes below 1, and for a bound that is not
    between 0 and 1.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Literal["relu", "tanh"] = "relu",
        output_bias: bool = True,
        lipschitz: float | None = None,
    ) -> None:
        super().__init__()
        _require_sizes(width=width, hidden=hidden)
        if activation not in ("relu", "tanh"):
            raise ValueError(f"activation is {activation!r}, but must be 'relu' or 'tanh'")
        self.state = nn.Linear(width, hidden, bias=False)
        self.injection = nn.Linear(width, hidden)
        self.activation = torch.relu if activation == "relu" else torch.tanh
        self.output = nn.Linear(hidden, width, bias=output_bias)
        check_lipschitz(lipschitz)
        self.lipschitz = lipschitz
        if lipschitz is not None:
            clip_norm(self.state, lipschitz**0.5)
            clip_norm(self.output, lipschitz**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.output(self.activation(self.state(z) + self.injection(x)))
        return y


def _require_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:  # torch would make a layer without weights, or not name the argument
            raise ValueError(f"{name} is {size}, but must be at least 1")
