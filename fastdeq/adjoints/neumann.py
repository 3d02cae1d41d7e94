"""The truncated Neumann series."""

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium
from fastdeq.adjoints.closing import Closing
from fastdeq.adjoints.linear import NeumannSeries
from fastdeq.notation import FlatMap
from fastdeq.settings import setting, settings
from fastdeq.solution import SolveResult


@settings
class Neumann(AbstractAdjoint):
    """v = Σ_{i ≤ k} (Jᵀ)ⁱ w, J = ∂f/∂z at the solution (Lorraine et al. 2020, arXiv 1911.02590;
    Geng et al. 2021, arXiv 2111.05177). In forward mode, the same of df at constant z, with J.

    steps: k; 0 would be the Jacobian-free gradient.
    Approximate: the error is (Jᵀ)ᵏ⁺¹ times the exact v, so it vanishes with k only where the
    spectral radius of J is below 1. k products with Jᵀ, all from one evaluation of f; no norms, and
    no wait for the device but one. Differentiable once; a second derivative raises RuntimeError.
    """

    steps: int = setting(default=10, at_least=1)

    def close(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        closing = Closing(NeumannSeries(steps=self.steps), "the Neumann adjoint", once=True)
        return closing.equilibrium(f, forward)
