"""Implicit differentiation: the exact gradient of the equilibrium, from one linear solve."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium
from fastdeq.adjoints.once import differentiable_once
from fastdeq.autocast import as_here
from fastdeq.autodiff import edges_behind, vjp
from fastdeq.krylov import GMRES
from fastdeq.notation import FlatMap
from fastdeq.rows import BatchMap, wrapped
from fastdeq.settings import setting, settings
from fastdeq.solution import BackwardReport, SolveResult, Status
from fastdeq.solvers import AbstractSolver, solve

_ONCE = (
    "the Implicit adjoint can be differentiated once, not twice: use the Unrolled adjoint with a "
    "tight tolerance where a second derivative of the equilibrium is needed"
)


@settings
class Implicit(AbstractAdjoint):
    """v with (I − Jᵀ) v = w, J = ∂f/∂z at z* (the implicit function theorem; Bai et al. 2019,
    arXiv 1909.01377, theorem 1).

    solver: `GMRES(...)`, or any fixed-point solver, which then iterates v ← Jᵀ v + w from v = w. It
        has its own tolerance and step limit. For a cell that couples the samples of a batch, set
        `per_sample=False`.

    Exact up to the solver's tolerance. Memory: one evaluation of f, and the linear solver's basis.
    Differentiable once. A gradient made with `create_graph=True` can be used; differentiating it
    raises RuntimeError, whatever the loss: use `Unrolled` there. Jacobian regularization needs only
    the first derivative (its double backward runs through the cell, not through the solve).

    A sample whose linear solve becomes non-finite, or ends without any progress, falls back to v =
    w (the Jacobian-free gradient) with a warning and a status: never zeros, never a silent NaN.
    """

    solver: GMRES | AbstractSolver = setting(default=GMRES())

    def close(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        if not torch.is_grad_enabled():
            output = f(forward.value)
            return Equilibrium(output, output - forward.value, forward)
        z_sol = forward.value.clone().requires_grad_()
        output = f(z_sol)
        if not _depends_on_others(output, z_sol):  # nothing to differentiate: all is frozen
            output = output.detach()
            return Equilibrium(output, output - forward.value, forward)
        report = BackwardReport()
        restrict = None
        if isinstance(f, BatchMap) and self.solver.compact:
            restrict = wrapped(f, partial(as_here, device=z_sol.device)).restrict  # type: ignore[attr-defined]
        value = _ImplicitFunction.apply(output, z_sol, self.solver, restrict, report)  # type: ignore[no-untyped-call]
        return Equilibrium(value, output - z_sol.detach(), forward, report)


class _ImplicitFunction(torch.autograd.Function):
    """Identity on output = f(z_in) in the forward pass; w ↦ v in the backward pass.

    The vjp v ↦ Jᵀ v reuses the graph of that one evaluation and differentiates with respect to z_in
    only: parameters are reached once, when v continues through `output`, as
    DistributedDataParallel expects. No hooks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        z_in: Tensor,
        solver: GMRES | AbstractSolver,
        restrict: Callable[[Tensor], FlatMap] | None,
        report: BackwardReport,
    ) -> Tensor:
        ctx.solver, ctx.restrict, ctx.report = solver, restrict, report
        ctx.save_for_backward(output, z_in)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None, None, None]:
        (w,) = cotangents
        output, z_in = ctx.saved_tensors
        product = _transposed(output, z_in, ctx.restrict)
        v = _solve_transposed(product, w.detach(), ctx.solver, ctx.report)
        # The graph of `output` starts at z_in, held constant, and v's own dependence on the
        # parameters is not recorded: a second derivative would be wrong.
        return differentiable_once(v, (w, output), _ONCE), None, None, None, None


def _depends_on_others(output: Tensor, z_in: Tensor) -> bool:
    """Whether the graph of output reaches a leaf other than z_in that requires gradients."""
    # Nodes of leaves (AccumulateGrad) have a variable.
    return any(getattr(node, "variable", z_in) is not z_in for node, _ in edges_behind(output))


def _transposed(output: Tensor, z: Tensor, restrict: Callable[[Tensor], FlatMap] | None) -> FlatMap:
    """v ↦ Jᵀ v through the graph from z to output; with `restrict`, of f, it can be restricted."""
    product = partial(vjp, output, z)
    if restrict is None:
        return product

    def of_rows(rows: Tensor) -> FlatMap:
        with torch.enable_grad():  # the graph of these samples alone costs one evaluation of f
            part = z.detach()[rows].requires_grad_()
            return partial(vjp, restrict(rows)(part), part)

    return BatchMap(product, of_rows)


def _solve_transposed(
    product: FlatMap, w: Tensor, solver: GMRES | AbstractSolver, report: BackwardReport
) -> Tensor:
    """Solve (I − Jᵀ) v = w and record the statistics. product: v ↦ Jᵀ v."""
    with torch.no_grad():
        if isinstance(solver, GMRES):
            result = solver.solve(wrapped(product, _subtracted), w)
        else:
            result = solve(solver, _added(product, w), w)
    report.stats = result.stats
    unchanged = (result.value == 0).all(dim=1) & (w != 0).any(dim=1)
    lost = (result.status == Status.DIVERGED) | (unchanged & ~result.converged)
    if bool(lost.any()):
        _warn(lost, w)
        return torch.where(lost[:, None], w, result.value)
    return result.value


def _subtracted(product: FlatMap) -> FlatMap:
    return lambda v: v - product(v)


def _added(product: FlatMap, w: Tensor) -> FlatMap:
    def added(v: Tensor) -> Tensor:
        return product(v) + w

    if not isinstance(product, BatchMap):
        return added
    restrict = product.restrict
    return BatchMap(added, lambda rows: _added(restrict(rows), w[rows]))


def _warn(lost: Tensor, w: Tensor) -> None:
    if bool(torch.isfinite(w).all()):
        why = (
            "it became non-finite or made no progress, and their gradients are Jacobian-free: "
            "raise max_steps of the adjoint's solver, or use another solver"
        )
    else:
        why = "the incoming gradient is not finite already: look at the loss"
    warnings.warn(
        f"backward solve failed for {int(lost.sum())} of {len(lost)} samples: {why}",
        RuntimeWarning,
        stacklevel=2,
    )
