"""The closing evaluation, with the derivatives of an equilibrium from linear systems with I − J."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastdeq.adjoints.base import Equilibrium
from fastdeq.adjoints.resolvent import Kind, Resolvent, Solver, with_derivatives
from fastdeq.autocast import as_here
from fastdeq.autodiff import carries_tangent, edges_behind, unfused_attention, vjp_here
from fastdeq.notation import FlatMap
from fastdeq.rows import BatchMap, wrapped
from fastdeq.solution import BackwardReport, SolveResult, Trace, TraceKind
from fastdeq.transforms import Transforms, leaf, transformed


@dataclass(frozen=True)
class Closing:
    """f at the solution of a solve, differentiable as an equilibrium.

    solver: of (I − P) v = w, P = Jᵀ for cotangents and J for tangents.
    order: how many derivatives there are. Transforms of torch.func raise it as they need.
    name: of the adjoint, for errors. once: it has one derivative, whatever is needed.
    clip, start: see `Kind`.
    """

    solver: Solver
    name: str
    order: int = 1
    once: bool = False
    clip: float | None = None
    start: Tensor | None = None

    def equilibrium(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        """forward: of the solve of f."""
        z_sol, report = forward.value, BackwardReport(trace=_kind_of(forward.trace))
        if torch.is_grad_enabled() or transformed():
            value, defect = self._differentiable(f, z_sol, report)
            return Equilibrium(value, defect, forward, report)
        output = f(z_sol)
        if not carries_tangent(output):
            return Equilibrium(output, output - z_sol, forward)
        with torch.enable_grad():  # products with J need the graph from z
            value, defect = self._differentiable(f, z_sol, report)
        return Equilibrium(value.clone(), defect.clone(), forward, report)

    def _differentiable(
        self, f: FlatMap, z_sol: Tensor, report: BackwardReport
    ) -> tuple[Tensor, Tensor]:
        """f(z_sol) with its derivatives as an equilibrium, and f(z_sol) − z_sol with those of this
        one evaluation."""
        order = self.order
        if transformed() and not self.once:
            order = max(order, _order_of_transforms())
        # Fused attention has neither a double backward nor a forward mode.
        with unfused_attention() if order > 1 else nullcontext():
            z_in = leaf(z_sol)
            step = partial(self._step, f, report, order)
            first = step(z_in, 0)
            output, _ = first
            defect = output - z_sol
            if not transformed() and _is_frozen(output, z_in):
                return output.detach(), defect.detach()
            return with_derivatives(step, z_in, first, output, order), defect

    def _step(
        self, f: FlatMap, report: BackwardReport, most: int, z_in: Tensor, order: int
    ) -> tuple[Tensor, Resolvent]:
        """f(z_in), and the resolvent of cotangents there.

        The vjp v ↦ Jᵀ v reuses the graph of this one evaluation and differentiates with respect to
        z_in only: parameters are reached once, when v continues through `output`, as
        DistributedDataParallel expects. No hooks.
        """
        output, restrict, linearize = f(z_in), None, None
        if isinstance(f, BatchMap) and self.solver.compact and not transformed():
            restrict = _restricted(f, z_in)
        if self.solver.compile and not transformed():
            linearize = partial(_linearized, wrapped(f, partial(as_here, device=z_in.device)), z_in)
        kind = Kind(
            solver=self.solver,
            order=order,
            inner=order < most - 1,
            refusal=self._refusal(most),
            report=report,
            restrict=restrict,
            linearize=linearize,
            clip=self.clip,
            start=self.start if order == most - 1 else None,  # of what the loss reads
        )
        return output, Resolvent(output, z_in, None, kind)

    def _refusal(self, order: int) -> str:
        times = "once, not twice" if order == 1 else f"{order} times, not {order + 1}"
        if self.once:
            return (
                f"{self.name} can be differentiated {times}: use Implicit(order=2), without clip, "
                "where a second derivative of the equilibrium is needed"
            )
        return (
            f"{self.name}(order={order}) can be differentiated {times}: set order={order + 1}, or "
            "use the Unrolled adjoint with a tight tolerance"
        )


def _kind_of(trace: Trace | None) -> TraceKind | None:
    """What the backward solve records: as the forward one."""
    if trace is None:
        return None
    return "residuals" if trace.states is None else "states"


def _order_of_transforms() -> int:
    around = Transforms()
    if around.forward > 1:
        raise RuntimeError(
            "an equilibrium has no forward mode within forward mode (torch.func.jvp or jacfwd, "
            "twice): let one of the two be reverse, as torch.func.hessian does"
        )
    return around.order


def _restricted(f: BatchMap, z_in: Tensor) -> Callable[[Tensor], FlatMap]:
    """The product for some samples, from a graph of these alone: one evaluation of f."""
    restrict = wrapped(f, partial(as_here, device=z_in.device)).restrict  # type: ignore[attr-defined]

    def of_rows(rows: Tensor) -> FlatMap:
        with torch.enable_grad():
            part = z_in.detach()[rows].requires_grad_()
            return partial(vjp_here, restrict(rows)(part), part)

    return of_rows


def _linearized(f: FlatMap, z_in: Tensor) -> FlatMap:
    """The product from an evaluation of f, in compiled code."""
    product = torch.func.vjp(f, z_in.detach())[1]
    return lambda v: product(v)[0]


def _is_frozen(output: Tensor, z_in: Tensor) -> bool:
    """Whether output depends on nothing else than z_in that has derivatives."""
    # Nodes of leaves (AccumulateGrad) have a variable.
    leaves = (getattr(node, "variable", z_in) for node, _ in edges_behind(output))
    return not (carries_tangent(output) or any(leaf is not z_in for leaf in leaves))
