"""The equilibrium layer, and the one that starts at a prediction."""

from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from fastdeq._fixed_point import check_settings, fixed_point
from fastdeq.adjoints import AbstractAdjoint, Implicit
from fastdeq.adjoints.states import StatesAt
from fastdeq.autocast import Precision
from fastdeq.krylov import GMRES
from fastdeq.nn.base import AbstractCellLayer
from fastdeq.nn.call import CellCall
from fastdeq.nn.coupling import check_coupling, coupling
from fastdeq.nn.initializers import (
    AbstractInitializer,
    ExplicitNetwork,
    FirstEvaluation,
    Zeros,
    zeros_of,
)
from fastdeq.nn.random_steps import RandomSteps
from fastdeq.notation import State, StateMap
from fastdeq.solution import Solution, TraceKind
from fastdeq.solvers import AbstractSolver, LimitedMemoryBroydenSolver

_CHUNK = 6  # steps


class DeepEquilibriumNetwork(AbstractCellLayer):
    """z* = f(z*, x), found by a solver and differentiated by an adjoint (Bai et al. 2019, arXiv
    1909.01377).

    cell, initializer, precision: as in `AbstractCellLayer`.
    solver, adjoint: settings; any of either (see `fastdeq.solvers`, `fastdeq.adjoints`). By default
        limited-memory Broyden and GMRES, with the `per_sample` that matches the cell.
    steps: draws the number of steps of a training call, see `RandomSteps`; None: as the solver.
    compile: as `compile_solves`.

    A batch norm that uses batch statistics couples the samples of a batch: use `per_sample=False`
    with it. Where it always does (track_running_stats=False), anything else is refused.

    Raises: as `AbstractCellLayer`; also TypeError for a solver or an adjoint of another type, and
    ValueError for `per_sample=True` with a cell that couples the samples in evaluation too.
    """

    solves: ClassVar[bool] = True

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: AbstractSolver | None = None,
        adjoint: AbstractAdjoint | None = None,
        initializer: AbstractInitializer | None = None,
        precision: Precision | None = None,
        steps: RandomSteps | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(cell, initializer, precision)
        alone = coupling(cell) is None
        self.solver = LimitedMemoryBroydenSolver(per_sample=alone) if solver is None else solver
        self.adjoint = Implicit(solver=GMRES(per_sample=alone)) if adjoint is None else adjoint
        check_settings(self.solver, self.adjoint)
        check_coupling(cell, self.solver, self.adjoint)
        if not isinstance(steps, RandomSteps | None):
            raise TypeError(
                f"steps is {steps!r}, but must be a RandomSteps or None: set a fixed number by "
                "the solver's max_steps"
            )
        self.steps = steps
        if compile:
            self.compile_solves()

    def compile_solves(self) -> None:
        """Set `compile` of the solver, and of the adjoint's solver where it has one.

        `check_every`, the number of steps that are compiled together, becomes 6 where it is 1.
        """
        self.solver = _compiled(self.solver)
        solver = getattr(self.adjoint, "solver", None)
        if solver is not None:
            self.adjoint = replace(self.adjoint, solver=_compiled(solver))  # type: ignore[call-arg]
        check_settings(self.solver, self.adjoint)

    def solve(
        self,
        f: StateMap,
        z0: State,
        trace: TraceKind | None,
        v0: Tensor | None = None,
        states: StatesAt | None = None,
        states_adjoint: AbstractAdjoint | None = None,
    ) -> Solution:
        """Raises and warns as `fixed_point`."""
        return fixed_point(
            f,
            z0,
            v0=v0,
            solver=self.solver_of_call(),
            adjoint=self.adjoint,
            trace=trace,
            states=states,
            states_adjoint=states_adjoint,
            select=f.select if isinstance(f, CellCall) else None,
        )

    def solver_of_call(self) -> AbstractSolver:
        """The solver with the number of steps of a call, which `steps` may draw."""
        if self.steps is None:
            return self.solver
        most = self.steps()
        least = self.solver.min_steps
        if self.training or (least is not None and least > most):
            least = most
        return replace(self.solver, max_steps=most, min_steps=least)

    @property
    def settings(self) -> dict[str, Any]:
        return {"solver": self.solver, "adjoint": self.adjoint}


_S = TypeVar("_S", bound=AbstractSolver | GMRES)


def _compiled(solver: _S) -> _S:
    chunk = _CHUNK if solver.check_every == 1 else solver.check_every
    return replace(solver, compile=True, check_every=chunk)


class SkipDeepEquilibriumNetwork(DeepEquilibriumNetwork):
    """A DEQ whose solver starts at a prediction (Pal et al. 2022, arXiv 2201.12240, §3.2).

    explicit: the network g_φ, x ↦ z₀ (Skip DEQ). None takes z₀ = f(0, x) (Skip Reg.), with `zeros`
        for the 0 where the state has neither the cell's scales nor the input's shape.

    Train it with `regularizers.skip_loss`, which draws prediction and equilibrium together; nothing
    else trains g_φ, since z* does not depend on z₀. The other arguments and the errors are those of
    `DeepEquilibriumNetwork`; also ValueError for `zeros` beside an explicit network.
    """

    def __init__(
        self,
        cell: nn.Module,
        explicit: nn.Module | None = None,
        *,
        zeros: Zeros | None = None,
        solver: AbstractSolver | None = None,
        adjoint: AbstractAdjoint | None = None,
        precision: Precision | None = None,
        steps: RandomSteps | None = None,
        compile: bool = False,
    ) -> None:
        if explicit is not None and zeros is not None:
            raise ValueError("an explicit network makes z₀ itself: leave out `zeros`")
        initializer: AbstractInitializer
        if explicit is None:
            initializer = FirstEvaluation(zeros_of(cell) if zeros is None else zeros)
        else:
            initializer = ExplicitNetwork(explicit)
        super().__init__(
            cell,
            solver=solver,
            adjoint=adjoint,
            initializer=initializer,
            precision=precision,
            steps=steps,
            compile=compile,
        )
