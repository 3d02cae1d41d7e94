"""The interface of a solver: settings, a state, and a step. The loop is in `loop.py`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdeq.flatten import check_floating
from fastdeq.norms import Pooling, finite, pooling, sample_norm
from fastdeq.notation import FlatMap
from fastdeq.settings import setting, settings
from fastdeq.solvers.termination import Iterate, Termination, TerminationMode


@dataclass(frozen=True)
class Step:
    """The result of a step: the new iterate, and (B,) which samples cannot continue."""

    iterate: Iterate
    stalled: Tensor | None = None


class Problem:
    """The map f as a solver's step sees it: every evaluation is counted and guarded.

    A finished or failed sample is evaluated at its frozen state instead of the proposed one, so
    that it cannot disturb the batch through f (through a batch norm, for example).
    """

    def __init__(self, f: FlatMap, z0: Tensor, pooling: Pooling) -> None:
        self.f = f
        self.pooling = pooling
        self.hold = z0  # (B, D): the last accepted state of every sample
        self.active = torch.ones(len(z0), dtype=torch.bool, device=z0.device)
        self.alive = self.active  # (B,): all but the diverged ones
        self.nfe = torch.zeros(len(z0), dtype=torch.int64, device=z0.device)

    def evaluate(self, z: Tensor, rows: Tensor | None = None) -> Iterate:
        """f at z, (B, D), for the active samples, or for those of them in `rows` (B,).

        f is not evaluated at a proposed state that is not finite; its residual is returned as NaN,
        which the loop treats as divergence. Other rows are returned at their frozen state.
        """
        rows = self.active if rows is None else self.active & rows
        with torch.no_grad():  # one pass: a sum is finite only if every entry is
            usable = finite(z.sum(dim=1))
        shown = torch.where((rows & usable)[:, None], z, self.hold)
        output = self.f(shown)
        if output.shape != shown.shape:
            raise ValueError(
                f"f(z) has shape {tuple(output.shape)} but z has shape {tuple(shown.shape)}: "
                "let f restore the shape of z"
            )
        check_floating(output, "f(z)")
        self.count(rows)
        g = output.to(shown.dtype) - shown
        return Iterate(shown, g.masked_fill((rows & ~usable)[:, None], torch.nan))

    def count(self, evaluations: Tensor) -> None:
        """Add evaluations, (B,): how many, or a mask for one each."""
        self.nfe = self.nfe + evaluations

    def residual(self, at: Iterate) -> Tensor:
        """Norm of an iterate's residual, (B,): per sample or shared, by the solver's setting."""
        return self.pooling.norm(at.residual, self.alive)

    def norm(self, v: Tensor) -> Tensor:
        """Norm of a (B, D) tensor, (B,): per sample or shared, by the solver's setting."""
        return self.pooling.norm(sample_norm(v), self.alive)


@settings
class AbstractSolver(ABC):
    """Find z = f(z). A solver is a record of settings; `init` and `step` are its method.

    tol: tolerance of the termination test; the default of `abstol` and `reltol`. Setting only the
        one that the termination mode does not use is refused.
    termination: one of the nine modes of `termination.py`.
    max_steps: iterations of the method at most, per sample.
    per_sample: stop, and choose steps, per sample; False uses the whole batch vector, as a cell
        that couples the samples of a batch (batch norm) needs.
    check_every: number of steps between two reads of whether all samples are done; more means fewer
        waits for the device and a few unused steps (results are the same: finished samples are
        frozen). Line searches and `vcab3` also wait, to save evaluations.
    """

    differentiable: ClassVar[bool] = True
    """Whether autograd may run through the steps (needed by the unrolled adjoint)."""

    tol: float = setting(default=1e-3, above=0)
    abstol: float | None = setting(default=None, at_least=0)
    reltol: float | None = setting(default=None, at_least=0)
    termination: TerminationMode = setting(default="rel_deq_best")
    max_steps: int = setting(default=50, at_least=1)
    per_sample: bool = setting(default=True)
    check_every: int = setting(default=1, at_least=1)

    def validate(self) -> None:
        """Refuse a tolerance that the termination mode does not use."""
        for name, mode, other in (("abstol", "rel", "reltol"), ("reltol", "abs", "abstol")):
            alone = getattr(self, name) is not None and getattr(self, other) is None
            if alone and self.termination.startswith(mode):
                raise ValueError(
                    f"{type(self).__name__}.{name} has no effect with termination="
                    f"'{self.termination}': give {other} or tol, or termination='norm'"
                )

    @property
    def rule(self) -> Termination:
        """The termination test that the fields describe."""
        return Termination(
            mode=self.termination,
            abstol=self.tol if self.abstol is None else self.abstol,
            reltol=self.tol if self.reltol is None else self.reltol,
        )

    @property
    def pooling(self) -> Pooling:
        """Norms per sample, or of the whole batch vector."""
        return pooling(self.per_sample)

    @abstractmethod
    def init(self, problem: Problem, first: Iterate) -> Any:
        """The method's memory before the first step."""

    @abstractmethod
    def step(self, problem: Problem, current: Iterate, memory: Any) -> tuple[Step, Any]:
        """One iteration from `current`, which the method may not change, with its new memory.

        Rows of finished samples are computed along with the others and ignored: a step must not let
        one row of the batch influence another, other than through `problem.norm`.
        """
