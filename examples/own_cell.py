"""A cell of your own in an equilibrium layer: any module f(z, x) that returns a state like z."""

import torch
from torch import Tensor, nn

import fastdeq
from fastdeq.nn import Zeros


class MessageCell(nn.Module):
    """f(z, x) = tanh(A z W + x): nodes of a graph exchange messages, A is a normalized graph."""

    def __init__(self, graph: Tensor, width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.weight.weight, gain=0.9)  # f is a contraction
        self.register_buffer("graph", graph / torch.linalg.matrix_norm(graph, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.graph @ self.weight(z) + x)  # (B, nodes, width)


def main() -> fastdeq.Solution:
    torch.manual_seed(0)
    ring = torch.eye(6).roll(1, dims=0) + torch.eye(6).roll(-1, dims=0)
    layer = fastdeq.DeepEquilibriumNetwork(MessageCell(ring, width=4), initializer=Zeros())
    solution: fastdeq.Solution
    z, solution = layer(torch.randn(3, 6, 4))
    z.square().mean().backward()
    print(solution)
    return solution


if __name__ == "__main__":
    main()
