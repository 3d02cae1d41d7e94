"""L4: ready-made cells f(z, x)."""

import torch
from torch import Tensor, nn


class DenseCell(nn.Module):
    """f(z, x) = relu(W z) + relu(U x) without biases: the cell of the fully connected MNIST
    experiment (arXiv 2201.12240, §4.1).

    width: features of z and of x, both (B, width). 2 · width² parameters.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(width, width, bias=False)
        self.injection = nn.Linear(width, width, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.relu(self.state(z)) + torch.relu(self.injection(x))
