"""What a solve returns. Failure is a value here, never an exception and never silent."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, SupportsFloat, TypeAlias

import torch
from torch import Tensor

from fastdeq.notation import State

TraceKind: TypeAlias = Literal["residuals", "states"]


@dataclass(frozen=True)
class Recording:
    """What a solve keeps of its iterates, beside its result.

    trace: the history to keep. steps: the steps after which a state is kept, ascending, from 1.
    """

    trace: TraceKind | None = None
    steps: tuple[int, ...] = ()


class Status(IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0
    STEP_LIMIT = 1
    STALLED = 2
    DIVERGED = 3
    NOT_SOLVED = 4

    @property
    def sentence(self) -> str:
        """What the status means and, where something went wrong, what helps."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "The residual met the tolerance.",
    Status.STEP_LIMIT: "The step limit came first: raise max_steps, loosen tol, or regularize the "
    "Jacobian; the best iterate is returned.",
    Status.STALLED: "Progress ended above the tolerance: loosen tol, use a wider dtype, or another "
    "solver; the best iterate is returned.",
    Status.DIVERGED: "The iteration became non-finite, left the protected range, or ran away while "
    "its residual did not fall (f may have no equilibrium): use another solver or a damped step, "
    "or regularize the Jacobian; the last good iterate is returned.",
    Status.NOT_SOLVED: "No equilibrium was requested: the cell was unrolled to a fixed depth, or "
    "integrated to a fixed time.",
}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The history of a solve, on request; row 0 is the start.

    residuals: (K + 1, B) ‖f(z) − z‖ after every step; a finished sample repeats its last value.
    states: (K + 1, B, D) the iterates themselves, with `trace="states"`; of GMRES, which does not
        compute them, None.
    """

    residuals: Tensor
    states: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)  # == of tensors has no single answer
class SolveStats:
    """Per-sample statistics of one solve, forward or backward.

    residual: (B,) ‖f(z) − z‖ (Euclidean) at the solver's iterate z_sol (a `Solution` returns
        f(z_sol), one evaluation further); in a backward solve ‖w − (I − Jᵀ) v‖.
    relative_residual: (B,) the same over ‖f(z)‖; of GMRES, over ‖w‖.
    steps: (B,) int64, iterations of the method while the sample was active.
    nfe: (B,) int64, evaluations of f (of a linear solve: products with the matrix).
    status: (B,) int64, values of `Status`.
    elapsed: the source of `seconds`: a number, or a stopwatch that has not been read yet.
    """

    residual: Tensor
    relative_residual: Tensor
    steps: Tensor
    nfe: Tensor
    status: Tensor
    elapsed: SupportsFloat = 0.0
    trace: Trace | None = None

    @property
    def seconds(self) -> float:
        """Time of the whole batch's solve or integration on its device; 0 without one.

        On CUDA, the first read waits until the device has finished the solve.
        """
        return float(self.elapsed)

    @property
    def converged(self) -> Tensor:
        """(B,) bool: the samples that met the tolerance."""
        return self.status == Status.CONVERGED

    def summary(self) -> str:
        """One line: how many samples have each status, NFE and residual."""
        counts = torch.bincount(self.status, minlength=len(Status)).tolist()
        ends = ", ".join(f"{n} {Status(i).name.lower()}" for i, n in enumerate(counts) if n)
        return (
            f"{len(self.status)} samples ({ends}), NFE mean {self.nfe.double().mean():.1f}, "
            f"relative residual at most {self.relative_residual.max():.1e}"
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SolveResult(SolveStats):
    """What a solver returns: `value` (B, D), never non-finite, and its statistics.

    states: those after the steps that were asked for, each (B, D). A sample that has ended keeps
        its last good state.
    """

    value: Tensor
    states: tuple[Tensor, ...] = ()

    @property
    def stats(self) -> SolveStats:
        """The statistics without the state."""
        own = ("value", "states")
        return SolveStats(**{name: kept for name, kept in vars(self).items() if name not in own})

    def __repr__(self) -> str:
        return f"SolveResult({self.summary()})"


@dataclass(kw_only=True)
class BackwardReport:
    """Filled in by the backward pass; `stats` stays None where that is ordinary backpropagation.

    trace: the history that the backward solve records: that of the forward solve.
    value: v, (B, D): the start of the next backward solve, on request (`v0` of `fixed_point`).
    solves: whether it solves (I − Jᵀ) v = w. Where it integrates an equation instead (a neural
        ODE's), the residuals of `stats` are NaN and its status is NOT_SOLVED.
    """

    stats: SolveStats | None = None
    solves: bool = True
    trace: TraceKind | None = None
    value: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Solution(SolveStats):
    """An equilibrium and its statistics, which are those of the forward solve.

    value: z* = f(z_sol, x), shaped like the state that was passed in, with gradients attached.
    z0: the initial state; keeps its own gradients (the skip loss trains through it).
    nfe: (B,) evaluations of f in the forward solve, including the closing one.
    defect: (B, D) f(z_sol) − z_sol with the graph of that one evaluation (the residual loss reads
        it).
    jacobian_loss: scalar estimate of ‖J‖²_F / D at z*, with `jacobian_loss=True`.
    error_bound: (B,) a bound of ‖z − z*‖, residual / (1 − L) (Banach), of `value` and of z_sol, up
        to rounding; of layers whose cell has an attribute `lipschitz`, a bound L < 1 of f in z.
    backward: iterations, residual and status of the adjoint's solve (or the cost of its
        integration), once it has run.
    states: f(z_k) after the steps k that `states` asked for, each shaped like `value`, with
        gradients of their own; a sample that has ended by then keeps its last good z_k.
    parts: the solutions that this one joins, of a network with several equilibria.
    aux: what f returned beside its value in its last evaluation, with `has_aux=True`.
    """

    value: State
    z0: State
    defect: Tensor
    jacobian_loss: Tensor | None = None
    error_bound: Tensor | None = None
    backward: BackwardReport = field(default_factory=BackwardReport)
    states: tuple[State, ...] = ()
    parts: tuple["Solution", ...] = ()
    aux: Any = None

    def __repr__(self) -> str:
        return f"Solution({self.summary()})"
