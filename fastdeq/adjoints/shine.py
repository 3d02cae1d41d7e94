"""The gradient by the inverse Jacobian of the forward solve."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium, solve_with_constants
from fastdeq.adjoints.closing import Closing
from fastdeq.adjoints.resolvent import LinearSolver
from fastdeq.krylov import GMRES
from fastdeq.norms import sample_norm
from fastdeq.notation import FlatMap
from fastdeq.settings import setting, settings
from fastdeq.solution import Recording, SolveResult
from fastdeq.solvers import AbstractSolver, BroydenSolver, LimitedMemoryBroydenSolver
from fastdeq.transforms import transformed


@settings
class Shine(AbstractAdjoint):
    """v = −Bᵀ w, B ≈ (J − I)⁻¹ from the forward solve (Ramzi et al. 2022, arXiv 2106.00553).

    steps: of GMRES on (I − Jᵀ) v = w that refine v, from there; 0: none.
    tol: of these steps, relative to the residual that they start with.
    per_sample: of these steps, as in `GMRES`.

    Approximate: B satisfies the secant equations of the solver's last steps, so v is good in the
    directions in which the state moved, and v = w across them. With `steps` it tends to the exact
    one. No product with Jᵀ but `steps` and two. Needs `LimitedMemoryBroydenSolver`, with `memory`
    at least its steps (a restart forgets B), or `BroydenSolver`. Differentiable once, in reverse
    mode; a second derivative raises RuntimeError. For states on the way, v starts at w.

    Departure from the reference: where v is not finite, it falls back to w, with a warning; the
    reference also does so where ‖v‖ is large.

    Raises: ValueError for other solvers; RuntimeError within transforms of torch.func.
    """

    steps: int = setting(default=0, at_least=0)
    tol: float = setting(default=1e-3, above=0)
    per_sample: bool = setting(default=True)

    def check(self, solver: AbstractSolver) -> None:
        """Refuse a solver without an inverse Jacobian."""
        if not isinstance(solver, LimitedMemoryBroydenSolver | BroydenSolver):
            raise ValueError(
                f"Shine uses the inverse Jacobian of a quasi-Newton solver, which "
                f"{type(solver).__name__} has not: use LimitedMemoryBroydenSolver or "
                "BroydenSolver, or the Implicit adjoint"
            )
        if solver.compile:
            raise ValueError(
                "Shine uses the memory of the forward solve, which a compiled solve does not keep: "
                "leave compile out, or use the Implicit adjoint"
            )

    def equilibrium(
        self, f: FlatMap, z0: Tensor, solver: AbstractSolver, record: Recording
    ) -> Equilibrium:
        if transformed():
            raise RuntimeError(
                "the Shine adjoint does not work within transforms of torch.func: use the Implicit "
                "adjoint"
            )
        forward, memory = solve_with_constants(f, z0, solver, record)
        assert isinstance(solver, LimitedMemoryBroydenSolver | BroydenSolver)
        return self._closed(f, forward, partial(solver.adjoint_estimate, memory))

    def close(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        return self._closed(f, forward, lambda w: w)

    def _closed(
        self, f: FlatMap, forward: SolveResult, estimate: Callable[[Tensor], Tensor]
    ) -> Equilibrium:
        refinement = None
        if self.steps:
            refinement = GMRES(tol=self.tol, max_steps=self.steps, per_sample=self.per_sample)
        refined = _Refined(estimate=estimate, refinement=refinement, per_sample=self.per_sample)
        return Closing(refined, "the Shine adjoint", once=True).equilibrium(f, forward)


@dataclass(frozen=True, kw_only=True)
class _Refined(LinearSolver):
    """An estimate of v, and steps of GMRES from there."""

    reverse_only: ClassVar[bool] = True

    estimate: Callable[[Tensor], Tensor]
    refinement: GMRES | None

    def solve(self, product: FlatMap, w: Tensor) -> Tensor | SolveResult:
        """v, with the record of its refinement, if there is one."""
        v = self.estimate(w)
        if self.refinement is None:
            return v
        v = torch.where(torch.isfinite(v).all(dim=1)[:, None], v, w)
        result = self.refinement.solve(lambda d: d - product(d), w - v + product(v))
        scale = sample_norm(w)
        relative = (result.residual / scale).masked_fill(scale == 0, 0.0)
        return replace(result, value=v + result.value, relative_residual=relative)
