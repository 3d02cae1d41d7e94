"""L2: implicit differentiation: the exact gradient of the equilibrium, from one linear solve."""

import warnings
from typing import Any

import torch
from torch import Tensor

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium, solve_without_graph
from fastdeq.krylov import GMRES
from fastdeq.notation import FlatMap
from fastdeq.products import transposed_product
from fastdeq.settings import setting, settings
from fastdeq.solution import BackwardReport, Status, TraceKind
from fastdeq.solvers import AbstractSolver, solve


@settings
class Implicit(AbstractAdjoint):
    """v with (I − Jᵀ) v = w, J = ∂f/∂z at z* (the implicit function theorem; Bai et al. 2019,
    arXiv 1909.01377, theorem 1).

    solver: `GMRES(...)`, or any fixed-point solver, which then iterates v ← Jᵀ v + w from v = w. It
        has tolerance and step limit of its own. With a cell that couples the samples of a batch,
        give it `per_sample=False`.

    Exact up to the solver's tolerance. Memory: one evaluation of f, and the linear solver's basis.
    Differentiable once, which Jacobian regularization is content with (its double backward runs
    through the cell, not through the solve); differentiating twice raises RuntimeError and names
    the cure.

    A sample whose linear solve turns non-finite, or ends without any progress, falls back to v = w
    (the Jacobian-free gradient) with a warning, and its status says so: never zeros, never a silent
    NaN.
    """

    solver: GMRES | AbstractSolver = setting(default=GMRES())

    def equilibrium(
        self, f: FlatMap, z0: Tensor, solver: AbstractSolver, trace: TraceKind | None
    ) -> Equilibrium:
        forward = solve_without_graph(f, z0, solver, trace)
        if not torch.is_grad_enabled():
            output = f(forward.value)
            return Equilibrium(output, output - forward.value, forward)
        z_sol = forward.value.clone().requires_grad_()
        output = f(z_sol)
        if not _leads_elsewhere(output, z_sol):  # nothing to differentiate: all is frozen
            output = output.detach()
            return Equilibrium(output, output - forward.value, forward)
        report = BackwardReport()
        value = _ImplicitFunction.apply(output, z_sol, self.solver, report)  # type: ignore[no-untyped-call]
        return Equilibrium(value, output - z_sol.detach(), forward, report)


class _ImplicitFunction(torch.autograd.Function):
    """Identity on output = f(z_in) in the forward pass; w ↦ v in the backward pass.

    The product v ↦ Jᵀ v reuses the graph of that one evaluation and differentiates with respect to
    z_in
    only: parameters are reached once, when v flows on through `output`, as DistributedDataParallel
    expects. No hooks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        z_in: Tensor,
        solver: GMRES | AbstractSolver,
        report: BackwardReport,
    ) -> Tensor:
        ctx.solver, ctx.report = solver, report
        ctx.save_for_backward(output, z_in)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None, None]:
        (w,) = cotangents
        output, z_in = ctx.saved_tensors
        v = _solve_transposed(output, z_in, w.detach(), ctx.solver, ctx.report)
        if torch.is_grad_enabled():  # create_graph=True
            v = _DifferentiableOnce.apply(v, w)  # type: ignore[no-untyped-call]
        return v, None, None, None


class _DifferentiableOnce(torch.autograd.Function):
    """Identity on v that refuses to be differentiated.

    The second derivative would need the dependence on z* of the evaluation at which v arrives, and
    that evaluation's graph starts at z_sol, held constant: the result would be silently wrong.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, w: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "the Implicit adjoint can be differentiated once, not twice: use the Unrolled adjoint "
            "with a tight tolerance where a second derivative of the equilibrium is needed"
        )


def _leads_elsewhere(output: Tensor, z_in: Tensor) -> bool:
    """Whether the graph of output reaches a leaf that wants gradients other than z_in.

    Ends at the first one found, so that in training it looks at a few nodes only.
    """
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of an AccumulateGrad node
        if leaf is not None and leaf is not z_in:
            return True
        waiting += [parent for parent, _ in node.next_functions]
    return False


def _solve_transposed(
    output: Tensor,
    z_in: Tensor,
    w: Tensor,
    solver: GMRES | AbstractSolver,
    report: BackwardReport,
) -> Tensor:
    """Solve (I − Jᵀ) v = w and record how it went."""

    def product(v: Tensor) -> Tensor:
        return transposed_product(output, z_in, v)

    with torch.no_grad():
        if isinstance(solver, GMRES):
            result = solver.solve(lambda v: v - product(v), w)
        else:
            result = solve(solver, lambda v: product(v) + w, w)
    report.stats = result.stats
    idle = (result.value == 0).all(dim=1) & (w != 0).any(dim=1)
    lost = (result.status == Status.DIVERGED) | (idle & ~result.converged)
    if bool(lost.any()):
        _warn(lost, w)
        return torch.where(lost[:, None], w, result.value)
    return result.value


def _warn(lost: Tensor, w: Tensor) -> None:
    if bool(torch.isfinite(w).all()):
        why = (
            "it turned non-finite or made no progress, and their gradients are Jacobian-free; give "
            "the adjoint's solver more max_steps, or another solver"
        )
    else:
        why = "the incoming gradient is not finite already: look at the loss"
    warnings.warn(
        f"backward solve failed for {int(lost.sum())} of {len(lost)} samples: {why}",
        RuntimeWarning,
        stacklevel=2,
    )
