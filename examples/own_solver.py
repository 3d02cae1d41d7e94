"""A solver of your own: settings, a memory (`init`) and a step. The loop does everything else."""

import torch
from torch import Tensor

import fastdeq
from fastdeq.settings import setting, settings
from fastdeq.solvers import AbstractSolver, Iterate, Picard, Problem, Step


@settings
class HeavyBall(AbstractSolver):
    """z ← z + ω g + β (z − z₋), with g = f(z) − z (Polyak 1964)."""

    omega: float = setting(default=0.6, above=0)
    beta: float = setting(default=0.3, at_least=0)

    def init(self, problem: Problem, first: Iterate) -> Tensor:
        return first.z

    def step(self, problem: Problem, current: Iterate, memory: Tensor) -> tuple[Step, Tensor]:
        z = current.z + self.omega * current.g + self.beta * (current.z - memory)
        return Step(problem.evaluate(z)), current.z


def main() -> dict[str, fastdeq.Solution]:
    torch.manual_seed(0)
    w = torch.randn(32, 32)
    w = -1.1 * w @ w.T / torch.linalg.matrix_norm(w @ w.T, 2)  # Picard iteration diverges
    found = {}
    for solver in (Picard(tol=1e-4), HeavyBall(tol=1e-4)):
        solution = fastdeq.fixed_point(lambda z: z @ w + 1, torch.zeros(4, 32), solver=solver)
        found[type(solver).__name__] = solution
        print(solution)
    return found


if __name__ == "__main__":
    main()
