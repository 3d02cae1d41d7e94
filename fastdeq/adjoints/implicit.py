"""Implicit differentiation: exact derivatives of the equilibrium, each from one linear solve."""

from dataclasses import dataclass, replace

from torch import Tensor

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium
from fastdeq.adjoints.closing import Closing
from fastdeq.krylov import GMRES
from fastdeq.notation import FlatMap
from fastdeq.settings import setting, settings
from fastdeq.solution import SolveResult
from fastdeq.solvers import AbstractSolver


@settings
class Implicit(AbstractAdjoint):
    """v with (I − Jᵀ) v = w, J = ∂f/∂z at z* (the implicit function theorem; Bai et al. 2019,
    arXiv 1909.01377, theorem 1). In forward mode, dz* with (I − J) dz* = df at constant z.

    solver: `GMRES(...)`, or any fixed-point solver, which then iterates v ← Jᵀ v + w from v = w. It
        has its own tolerance and step limit. For a cell that couples the samples of a batch, set
        `per_sample=False`.
    order: how many times the equilibrium can be differentiated: in reverse mode with
        `create_graph=True`, in forward mode, or in both. Each order above the first costs one more
        evaluation of f with its graph in every call, and one more product Jᵀ v in every backward
        pass; differentiating a gradient costs a solve with I − J and one with I − Jᵀ. The
        transforms of torch.func (grad, hessian, ...) raise it by themselves.
    clip: the most that ‖v‖ / ‖w‖ may be, per sample; a longer v is scaled down. Where I − J is
        nearly singular, this bounds what one sample contributes to the gradient, which is then not
        exact and can be differentiated once. None: no bound.

    Exact up to the solver's tolerance. Memory: `order` evaluations of f, and the linear solver's
    basis. Differentiating more than `order` times raises RuntimeError, whatever the loss. (Jacobian
    regularization needs only the first derivative: its double backward runs through the cell.)

    A sample whose linear solve becomes non-finite, or ends without any progress, falls back to v =
    w (the Jacobian-free gradient) with a warning and a status: never zeros, never a silent NaN.
    """

    solver: GMRES | AbstractSolver = setting(default=GMRES())
    order: int = setting(default=1, at_least=1)
    clip: float | None = setting(default=None, above=0)

    def validate(self) -> None:
        """Refuse a clipped gradient with derivatives: it is not that of the equilibrium."""
        if self.clip is not None and self.order > 1:
            raise ValueError(
                f"Implicit.clip changes the gradient, which then has no derivatives, but order is "
                f"{self.order}: leave one of the two out"
            )

    def close(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        return self.closing.equilibrium(f, forward)

    @property
    def closing(self) -> Closing:
        """The closing evaluation, with these settings."""
        once = self.clip is not None
        return Closing(self.solver, "Implicit", self.order, once=once, clip=self.clip)


@dataclass(frozen=True)
class StartedImplicit(AbstractAdjoint):
    """Implicit, whose backward solve starts at v0, (B, D)."""

    adjoint: Implicit
    v0: Tensor

    def close(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        return replace(self.adjoint.closing, start=self.v0).equilibrium(f, forward)
