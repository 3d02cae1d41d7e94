"""Find z = f(z) with any solver and differentiate it with any adjoint."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from fastdeq.adjoints import AbstractAdjoint, Direct, Equilibrium, Implicit, Shine
from fastdeq.adjoints.implicit import StartedImplicit
from fastdeq.adjoints.states import StatesAt, check_closing, chosen_steps, closed
from fastdeq.flatten import Layout
from fastdeq.norms import sample_norm
from fastdeq.notation import FlatMap, State, StateMap
from fastdeq.rows import BatchMap
from fastdeq.solution import Recording, Solution, Status, TraceKind
from fastdeq.solvers import AbstractSolver, LimitedMemoryBroydenSolver
from fastdeq.transforms import Transforms, mapped_only, plain, transformed

_DEFAULT_SOLVER = LimitedMemoryBroydenSolver()
_DEFAULT_ADJOINT = Implicit()


def fixed_point(
    f: StateMap,
    z0: State,
    *,
    v0: Tensor | None = None,
    solver: AbstractSolver = _DEFAULT_SOLVER,
    adjoint: AbstractAdjoint = _DEFAULT_ADJOINT,
    trace: TraceKind | None = None,
    states: StatesAt | None = None,
    states_adjoint: AbstractAdjoint | None = None,
    select: Callable[[Tensor], StateMap] | None = None,
    batched: bool = True,
    has_aux: bool = False,
) -> Solution:
    """Solve z = f(z) for every sample of a batch; the result is differentiable in all that f closes
    over.

    f: maps a state to one of the same shape. What it needs besides z (input, parameters) it closes
        over; their gradients arrive by ordinary backpropagation.
    z0: the initial state: a (B, ...) floating-point tensor, or a tuple or dictionary of them, one
        per scale. It gets gradients only from the unrolled adjoint: an equilibrium does not depend
        on its start. An empty batch, B = 0, is not solved: f is evaluated once.
    v0: start the backward solve of `Implicit` at the best multiple of this cotangent, (B, D), for
        one product: `solution.backward.value` of an earlier call with the same samples, once its
        backward pass has run. It pays where the same batch is solved again with little change.
    trace: record the history of residual norms ("residuals"), or of states too ("states"), of the
        forward solve and of the one that the backward pass of an implicit adjoint makes.
    states: also return states on the way, as `solution.states`: n of them, after steps evenly
        spaced up to the solver's max_steps (n=3 of 40: after steps 10, 20 and 30), or those after
        the listed steps, [2, 8]. Each is closed by one evaluation of f, which gives it a gradient
        and is not in the NFE. No other states are kept.
    states_adjoint: of the states on the way, such as `JacobianFree()` or `Phantom()`, which spare
        the linear solve that `Implicit` makes for each; None: `adjoint`.
    select: rows ↦ f for these samples of the batch alone, with rows (n,) int64; needed by a solver
        with `compact`. For f(z) = cell(z, x) it is rows ↦ (z ↦ cell(z, x[rows])).
    batched: False: a state has no batch axis and is one sample; statistics are those of one, (1,).
    has_aux: f returns (value, aux). `solution.aux` is that of its last evaluation in the forward
        pass: the closing one, at the solution, or the last step of `Phantom`.

    Returns a `Solution`. A sample that does not converge is not an error: its best iterate is
    returned, and `solution.status` reports what happened.

    Raises: TypeError for settings that are not a solver or an adjoint, and for a z0 or an f(z) that
        is not floating point; ValueError for f(z) of another shape than z, for a v0 of another one
        than (B, D) or without `Implicit`, for an adjoint that does not support the solver, and for
        states beyond the solver's last step; RuntimeError for
        derivatives that the adjoint does not have. Warns (RuntimeWarning) where f itself is not
        finite.
    """
    check_settings(solver, adjoint)
    check_closing(states_adjoint, adjoint)
    record = Recording(trace, chosen_steps(states, solver.max_steps))
    _check_select(select, solver, adjoint)
    if trace not in (None, *get_args(TraceKind)):
        raise ValueError(f"trace is {trace!r}, but must be 'residuals', 'states' or None")
    layout, aux = Layout.of(z0, batched=batched), _Aux(has_aux)
    flat_f = flat_map(aux.removed(f), layout)
    if select is not None:
        flat_f = BatchMap(flat_f, lambda rows: flat_map(aux.removed(select(rows)), layout))
    start = layout.flatten(z0)
    if not start.shape[0]:
        solution = _of_nothing(flat_f, layout, z0, start, len(record.steps))
        return replace(solution, aux=aux.last)
    if v0 is not None:
        adjoint = _started(adjoint, v0, start)
    find = _found_by_vmap if mapped_only() else _found
    found, last = find(flat_f, start, solver, adjoint, record), aux.last
    stats = found.forward.stats
    on_the_way = closed(flat_f, found, adjoint, states_adjoint)
    return Solution(
        aux=last,
        value=layout.unflatten(found.value),
        z0=z0,
        defect=found.defect,
        backward=found.backward,
        states=tuple(layout.unflatten(each) for each in on_the_way),
        **vars(replace(stats, nfe=stats.nfe + 1)),  # the closing evaluation
    )


def _started(adjoint: AbstractAdjoint, v0: Tensor, z0: Tensor) -> AbstractAdjoint:
    """The adjoint with a start of its backward solve. Raises: ValueError, RuntimeError."""
    if not isinstance(adjoint, Implicit):
        raise ValueError(
            f"v0 starts the backward solve of Implicit, and {type(adjoint).__name__} makes no such "
            "solve: leave v0 out, or use Implicit"
        )
    if transformed():
        raise RuntimeError("v0 has no place within transforms of torch.func: leave it out")
    if not isinstance(v0, Tensor) or v0.shape != z0.shape:
        shape = tuple(v0.shape) if isinstance(v0, Tensor) else type(v0).__name__
        raise ValueError(
            f"v0 is {shape}, but must be a tensor of the flat state's shape, {tuple(z0.shape)}: "
            "give solution.backward.value of an earlier call with the same samples"
        )
    return StartedImplicit(adjoint, v0.detach().to(z0))


def _found(
    f: FlatMap, z0: Tensor, solver: AbstractSolver, adjoint: AbstractAdjoint, record: Recording
) -> Equilibrium:
    return _without_nonfinite(adjoint.equilibrium(f, z0, solver, record))


def _found_by_vmap(
    f: FlatMap, z0: Tensor, solver: AbstractSolver, adjoint: AbstractAdjoint, record: Recording
) -> Equilibrium:
    """One solve of all that torch.vmap maps, also differentiated outside of it."""
    around = Transforms()
    solver = around.settings(solver)
    if isinstance(adjoint, Implicit):
        adjoint = replace(adjoint, solver=around.settings(adjoint.solver))
    elif isinstance(adjoint, Direct | Shine):
        around.check(adjoint.per_sample)
    run = partial(_found, solver=solver, adjoint=adjoint, record=record)
    found = around.outside(run, f, z0)
    return replace(
        found,
        value=around.within(found.value),
        defect=around.within(found.defect),
        forward=around.record(found.forward),
    )


def fixed_depth(f: StateMap, z0: State, *, depth: int) -> Solution:
    """Apply f `depth` times to z0 with ordinary backpropagation: no solve (pretraining, baselines).

    Memory grows with the depth. Raises: as `fixed_point`, and ValueError for a depth below 1.
    """
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise ValueError(f"depth is {depth!r}, but must be a whole number of at least 1")
    layout = Layout.of(z0)
    flat_f = flat_map(f, layout)
    z = last = layout.flatten(z0)
    for _ in range(depth):
        last, z = z, flat_f(z)
    steps = torch.full((z.shape[0],), depth, device=z.device)
    return unsolved(layout, z0, last, z, steps=steps, nfe=steps.clone())


def unsolved(
    layout: Layout, z0: State, last: Tensor, z: Tensor, *, steps: Tensor, nfe: Tensor
) -> Solution:
    """The record of z = f(last), both (B, D), where no equilibrium was requested.

    steps, nfe: (B,).
    """
    residual, size = sample_norm((z - last).detach()), sample_norm(z.detach())
    return Solution(
        value=layout.unflatten(z),
        z0=z0,
        defect=z - last,
        residual=residual,
        relative_residual=torch.where(residual == 0, 0.0, residual / size),
        steps=steps,
        nfe=nfe,
        status=torch.full_like(steps, int(Status.NOT_SOLVED)),
    )


def _of_nothing(f: FlatMap, layout: Layout, z0: State, start: Tensor, states: int) -> Solution:
    """The solution for an empty batch: f(z0), whose gradients are zero."""
    none = torch.zeros(0, dtype=torch.int64, device=start.device)
    solution = unsolved(layout, z0, start, f(start), steps=none, nfe=none)
    return replace(solution, states=(solution.value,) * states)


class _Aux:
    """What f returns beside its value, of its last evaluation."""

    def __init__(self, present: bool) -> None:
        self.present, self.last = present, None

    def removed(self, f: Callable[[Any], Any]) -> StateMap:
        """f without it. Raises: TypeError for an f that does not return a pair."""
        if not self.present:
            return f

        def value_alone(z: Any) -> Any:
            output = f(z)
            if not isinstance(output, tuple) or len(output) != 2:
                raise TypeError(
                    f"f returns a {type(output).__name__}, but with has_aux=True it returns a pair "
                    "(value, aux)"
                )
            value, self.last = output
            return value

        return value_alone


def flat_map(f: StateMap, layout: Layout) -> FlatMap:
    """f on flat states, (B, D) → (B, D), checked.

    Raises: as `Layout.flatten_output`, and ValueError for an f that writes into its argument.
    """

    def flat_f(z: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return layout.flatten_output(f(layout.unflatten(z)), z)
        if z.is_inference():  # counts no versions: let f write into a copy
            return layout.flatten_output(f(layout.unflatten(z.clone())), z)
        version = z._version
        output = layout.flatten_output(f(layout.unflatten(z)), z)
        if z._version != version:
            raise ValueError(
                "f changes its argument z in place, which would make f(z) − z zero everywhere: use "
                "operations that make a new tensor (torch.relu(z) for torch.relu_(z), z * a for "
                "z.mul_(a))"
            )
        return output

    return flat_f


def _without_nonfinite(found: Equilibrium) -> Equilibrium:
    """Keep the solver's state where f is not finite even there, and warn."""
    value, forward = found.value, found.forward
    finite = torch.isfinite(value.detach().sum(dim=1))
    seen = plain(finite)
    if bool(seen.all()):  # waits for the device, once per solve
        return found
    warnings.warn(
        f"f is not finite at the returned state of {int((~seen).sum())} of {len(seen)} samples: "
        "their last good state is returned, their status is DIVERGED, and gradients of parameters "
        "may be NaN; look for NaN in the input or for a division or logarithm in f",
        RuntimeWarning,
        stacklevel=4,
    )
    status = torch.where(finite, forward.status, int(Status.DIVERGED))
    value = torch.where(finite[:, None], value, forward.value)
    return replace(found, value=value, forward=replace(forward, status=status))


def _check_select(select: object, solver: AbstractSolver, adjoint: AbstractAdjoint) -> None:
    compact = solver.compact or (isinstance(adjoint, Implicit) and adjoint.solver.compact)
    if compact and select is None:
        raise ValueError(
            "a solver with `compact` evaluates f for some of the samples: give `select`, which "
            "restricts f to these, such as lambda rows: (lambda z: cell(z, x[rows]))"
        )


def check_settings(solver: AbstractSolver, adjoint: AbstractAdjoint) -> None:
    """Refuse what is not a solver or an adjoint, and an adjoint that does not support the solver.

    Raises: TypeError with an example of what to give; ValueError where the two do not match.
    """
    for given, kind, example in (
        (solver, AbstractSolver, "fastdeq.solvers.Anderson()"),
        (adjoint, AbstractAdjoint, "fastdeq.adjoints.Implicit()"),
    ):
        if not isinstance(given, kind):
            hint = "an instance" if isinstance(given, type) else "settings"
            raise TypeError(f"{given!r} is not an {kind.__name__}: give {hint}, such as {example}")
    adjoint.check(solver)
