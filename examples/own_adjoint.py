"""An adjoint of your own: `close` evaluates f at the solution and attaches a gradient."""

import torch

import fastdeq
from fastdeq.adjoints import AbstractAdjoint, Implicit
from fastdeq.adjoints.base import Equilibrium
from fastdeq.notation import FlatMap
from fastdeq.settings import setting, settings
from fastdeq.solution import SolveResult
from fastdeq.solvers import Anderson


@settings
class Polished(AbstractAdjoint):
    """Backpropagation through `steps` evaluations of f after the solve.

    Approximate: the gradient of the truncated Neumann series with as many terms.
    """

    steps: int = setting(default=5, at_least=1)

    def close(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        z = forward.value
        for _ in range(self.steps):
            last, z = z, f(z)
        return Equilibrium(z, z - last, forward)


def main() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(16, 16), torch.randn(8, 16)
    solver = Anderson(tol=1e-6)
    gradients = {}
    for adjoint in (Implicit(), Polished(steps=1), Polished(steps=20)):
        layer.zero_grad()
        solution = fastdeq.fixed_point(
            lambda z: torch.tanh(layer(z) + x), torch.zeros(8, 16), solver=solver, adjoint=adjoint
        )
        assert isinstance(solution.value, torch.Tensor)
        solution.value.square().mean().backward()
        assert layer.weight.grad is not None
        gradients[str(adjoint)] = layer.weight.grad.clone()
    exact, *others = gradients.values()
    for name, gradient in zip(list(gradients)[1:], others, strict=True):
        error = (gradient - exact).norm() / exact.norm()
        print(f"{name}: relative error of the gradient {error:.1e}")
    return gradients


if __name__ == "__main__":
    main()
