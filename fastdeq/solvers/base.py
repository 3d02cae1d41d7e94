"""The interface of a solver: settings, a state, and a step. The loop is in `loop.py`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastdeq.flatten import check_floating
from fastdeq.norms import Pooling, finite, pooling, sample_norm
from fastdeq.notation import FlatMap
from fastdeq.settings import setting, settings
from fastdeq.solvers.termination import Iterate, Termination, TerminationMode


class Step(NamedTuple):
    """The result of a step: the new iterate, and (B,) which samples cannot continue."""

    iterate: Iterate
    stalled: Tensor | None = None


class Problem:
    """The map f as a solver's step sees it: every evaluation is counted and guarded.

    A finished or failed sample is evaluated at its frozen state instead of the proposed one, so
    that it cannot disturb the batch through f (through a batch norm, for example).

    guarded: evaluate f at the frozen state also where a proposed state is not finite.
    fixed_shapes: whether a method's memory consists of tensors whose shapes do not change, and its
        steps make no decision on the host (in compiled solves).
    """

    def __init__(
        self,
        f: FlatMap,
        z0: Tensor,
        pooling: Pooling,
        *,
        guarded: bool = True,
        fixed_shapes: bool = False,
    ) -> None:
        self.f, self.fixed_shapes = f, fixed_shapes
        self.pooling = pooling
        self.guarded = guarded
        self.hold = z0  # (B, D): the state at which a finished sample is evaluated
        self.active = torch.ones(z0.shape[0], dtype=torch.bool, device=z0.device)
        self.alive = self.active  # (B,): all but the diverged ones
        self.all_active = True  # no sample is frozen
        self._rows: Tensor | None = None  # (n,), of the samples that f is evaluated for; None: all
        self._f = f  # of these samples
        self._count: int | Tensor = 0

    def freeze(self, hold: Tensor, active: Tensor, alive: Tensor) -> None:
        """From now on, evaluate at `hold` (B, D) the samples that are not in `active` (B,)."""
        self.hold, self.active, self.alive = hold, active, alive
        self.all_active = False

    def narrow(self, restrict: Callable[[Tensor], FlatMap]) -> None:
        """From now on, evaluate f for the active samples alone, by its restriction to them."""
        self._rows = self.active.nonzero()[:, 0]
        self._f = restrict(self._rows)

    def evaluate(
        self, z: Tensor, rows: Tensor | None = None, *, guarded: bool | None = None
    ) -> Iterate:
        """f at z, (B, D), for the active samples, or for those of them in `rows` (B,).

        guarded: by default as this problem. f is then not evaluated at a proposed state that is not
        finite; its residual is returned as NaN, which the loop treats as divergence. Other rows are
        returned at their frozen state.
        """
        self.count(1 if rows is None else rows)
        if rows is None and not self.all_active:
            rows = self.active
        elif rows is not None and not self.all_active:
            rows = self.active & rows
        lost = None
        if self.guarded if guarded is None else guarded:
            with torch.no_grad():  # one pass: a sum is finite only if every entry is
                usable = finite(z.sum(dim=1))
            lost = ~usable if rows is None else rows & ~usable
            rows = usable if rows is None else rows & usable
        shown = z if rows is None else torch.where(rows[:, None], z, self.hold)
        if self._rows is not None:
            return self._evaluate_rows(shown, self._rows)
        output = self._evaluated(shown)
        g = output - shown
        return Iterate(shown, g if lost is None else g.masked_fill(lost[:, None], torch.nan))

    def _evaluated(self, z: Tensor) -> Tensor:
        output = self._f(z)
        if output.shape != z.shape:
            raise ValueError(
                f"f(z) has shape {tuple(output.shape)} but z has shape {tuple(z.shape)}: "
                "let f restore the shape of z"
            )
        check_floating(output, "f(z)")
        return output.to(z.dtype)

    def _evaluate_rows(self, z: Tensor, rows: Tensor) -> Iterate:
        """f for some samples; the residual of the others, which are finished, is zero here."""
        part = z.index_select(0, rows)
        g = torch.zeros_like(z).index_copy(0, rows, self._evaluated(part) - part)
        return Iterate(z, g)

    def count(self, evaluations: int | Tensor) -> None:
        """Add evaluations: a number for all samples, or (B,) numbers, or a mask for one each."""
        self._count = self._count + evaluations

    def take_count(self) -> int | Tensor:
        """The evaluations since the last call, to be counted for the active samples."""
        count, self._count = self._count, 0
        return count

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
    min_steps: before this many, no sample ends, unless it diverges or its method cannot continue;
        None: a sample may end at its start.
    per_sample: stop, and choose steps, per sample; False uses the whole batch vector, as a cell
        that couples the samples of a batch (batch norm) needs.
    check_every: number of steps between two reads of whether all samples are done; more means fewer
        waits for the device and a few unused steps (results are the same: finished samples are
        frozen). Line searches and `vcab3` also wait, to save evaluations.
    compact: once this share of the samples that f is evaluated for has ended, f is evaluated for
        the rest alone; None: always for all. Needs an f that can be restricted to some samples (see
        `fixed_point`), pays where they need very different numbers of steps, and gives the same
        results to rounding. Products with the Jacobian in `NewtonKrylov` remain those of all.
    compile: run `check_every` steps, with f and all tests, as one graph of `torch.compile`: the
        same results to rounding, several times faster where f is small. The first solve for a set
        of shapes takes from seconds to minutes. See `compiles_steps` for the methods of which f
        alone is compiled. Solves that record a trace, and those that autograd runs through (the
        unrolled adjoint), are not compiled.
    """

    differentiable: ClassVar[bool] = True
    """Whether autograd may run through the steps (needed by the unrolled adjoint)."""
    compiles_steps: ClassVar[bool] = False
    """Whether steps decide nothing on the host, with a memory of fixed shape if `problem` asks for
    it, so that `compile` includes them."""
    takes_one_evaluation: ClassVar[bool] = False
    """Whether each step evaluates f once, at the iterate that it returns."""

    tol: float = setting(default=1e-3, above=0)
    abstol: float | None = setting(default=None, at_least=0)
    reltol: float | None = setting(default=None, at_least=0)
    termination: TerminationMode = setting(default="rel_deq_best")
    max_steps: int = setting(default=50, at_least=1)
    min_steps: int | None = setting(default=None, at_least=1)
    per_sample: bool = setting(default=True)
    check_every: int = setting(default=1, at_least=1)
    compact: float | None = setting(default=None, above=0, at_most=1)
    compile: bool = setting(default=False)

    def validate(self) -> None:
        """Refuse a tolerance that the termination mode does not use, `compact` for a shared norm,
        and a `min_steps` above `max_steps`."""
        if (self.min_steps or 0) > self.max_steps:
            raise ValueError(
                f"{type(self).__name__}.min_steps is {self.min_steps}, but must be at most "
                f"max_steps, which is {self.max_steps}"
            )
        if self.compact is not None and not self.per_sample:
            raise ValueError(
                f"{type(self).__name__}.compact evaluates samples apart from each other, but "
                "per_sample=False says that they are coupled: leave one of the two out"
            )
        if self.compact is not None and self.compile:
            raise ValueError(
                f"{type(self).__name__}.compact changes the shapes that `compile` has compiled f "
                "for: leave one of the two out"
            )
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
    def guarded(self) -> bool:
        """Whether f must not see states that are not finite: where it may couple the samples, one
        would reach the others before the host looks."""
        return not self.per_sample and not (self.takes_one_evaluation and self.check_every == 1)

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


def check_history(solver: Any) -> None:
    """Refuse `history`, which a quasi-Newton method has, together with `compile`.

    Raises: ValueError.
    """
    if solver.history is not None and solver.compile:
        raise ValueError(
            f"{type(solver).__name__}.history is for eager solves: leave it or `compile` out"
        )
