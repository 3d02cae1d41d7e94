"""Measures one training step with every combination of solver, adjoint and precision."""

import math
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastdeq.adjoints import AbstractAdjoint, Implicit
from fastdeq.autocast import Precision
from fastdeq.bench.operations import OutOfTime, Watch
from fastdeq.bench.step import TrainingStep
from fastdeq.krylov import GMRES
from fastdeq.solution import Solution, SolveStats
from fastdeq.solvers import AbstractSolver, LimitedMemoryBroydenSolver

CONVERGED, COSINE = 0.99, 0.99
"""The least share of converged samples and the least cosine of a combination to recommend."""

_FOR_EXACT, _FOR_FIRST = 0.3, 0.5  # shares of the seconds; the rest is for repetitions
_MOST = 20  # repetitions


Names: TypeAlias = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A solver, an adjoint and a precision of f, by their names and as settings."""

    names: Names
    solver: AbstractSolver
    adjoint: AbstractAdjoint
    precision: Precision | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a combination costs and how exact it is.

    nfe, vjps: evaluations of f and VJPs of the backward solve, means over the samples; None: there
    is no backward solve. residual: the largest relative one of the batch.
    converged: share of the samples. cosine: between the gradients of all parameters and the exact
    ones. memory: bytes at the peak, above those before the step. forward, backward: seconds, of
    each repetition.
    """

    combination: Combination
    nfe: float
    vjps: float | None
    residual: float
    converged: float
    cosine: float
    memory: int
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> tuple[float, float]:
        """Medians of the forward and of the backward pass."""
        return statistics.median(self.forward), statistics.median(self.backward)

    @property
    def is_good(self) -> bool:
        """Whether the samples have converged and the gradient is nearly the exact one."""
        return self.converged >= CONVERGED and self.cosine >= COSINE


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """measured: the fastest first. refused: why a combination cannot be used. late: those that the
    time did not suffice for. exact_residual: of the solve behind the exact gradients.
    """

    measured: list[Measured]
    refused: dict[str, str]
    late: list[Combination]
    exact_residual: float

    @property
    def recommended(self) -> Measured | None:
        """The fastest good one."""
        return next((one for one in self.measured if one.is_good), None)


def combinations(
    solvers: dict[str, AbstractSolver],
    adjoints: dict[str, AbstractAdjoint],
    precisions: dict[str, Precision | None],
) -> list[Combination]:
    """All of them. The first ones differ least from the first of each, the configured ones."""
    places = product(*(list(enumerate(group)) for group in (solvers, adjoints, precisions)))
    ordered = sorted(places, key=lambda place: sum(number > 0 for number, _ in place))
    return [
        Combination(
            names=(solver, adjoint, precision),
            solver=solvers[solver],
            adjoint=adjoints[adjoint],
            precision=precisions[precision],
        )
        for (_, solver), (_, adjoint), (_, precision) in ordered
    ]


def compare(step: TrainingStep, wanted: Sequence[Combination], seconds: float) -> Comparison:
    """Measure each combination once, then those that may be the fastest in turns until the seconds
    are over. One that takes longer than a fifth of the seconds is given up.

    Raises: ValueError where the loss or its exact gradient is not finite or takes too long, and
        where no combination could be measured.
    """
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table has what they say
        exact, exact_residual = _exact(step, wanted[0].solver, _FOR_EXACT * seconds)
        measured: list[Measured] = []
        refused: dict[str, str] = {}
        late: list[Combination] = []
        for one in wanted:
            left = begin + (_FOR_EXACT + _FOR_FIRST) * seconds - time.perf_counter()
            try:
                if left <= 0:
                    raise OutOfTime
                measured.append(_first(step, one, exact, seconds / 5))
                _again(step, measured[-1:])
            except OutOfTime:
                late.append(one)
            except (ValueError, TypeError) as error:
                refused[" ".join(one.names)] = str(error)
        if not measured:
            raise ValueError(_why_none(refused, seconds))
        measured.sort(key=_total)
        close = [one for one in measured if _total(one) <= 2 * _total(measured[0])]
        for _ in range(_MOST):
            if time.perf_counter() - begin > seconds:
                break
            _again(step, close)
    measured.sort(key=_total)
    return Comparison(measured=measured, refused=refused, late=late, exact_residual=exact_residual)


def _why_none(refused: dict[str, str], seconds: float) -> str:
    late = f"no combination is done within --seconds {seconds:g}: give more, or a smaller batch"
    return next(iter(refused.values()), late)


def _total(one: Measured) -> float:
    return sum(one.seconds)


def _exact(step: TrainingStep, like: AbstractSolver, limit: float) -> tuple[Tensor, float]:
    """The gradients of tight solves without autocast, and the residual of the forward one."""
    tight = partial(dict[str, Any], tol=1e-5, per_sample=like.per_sample)
    one = Combination(
        names=("", "", ""),
        solver=LimitedMemoryBroydenSolver(**tight(max_steps=100)),
        adjoint=Implicit(solver=GMRES(**tight(max_steps=60, restart=30))),
        precision=None,
    )
    try:
        with Watch(limit):
            loss, solution = _forward(replace(step, autocast=nullcontext), one)
            gradients = _gradients(step, loss)
    except OutOfTime:
        raise ValueError(
            f"the exact gradient takes longer than {limit:.3g} seconds: give a larger --seconds, "
            "or a smaller batch (data.batch_size)"
        ) from None
    if not bool(torch.isfinite(gradients).all()):
        raise ValueError("the loss or its gradient is not finite: look for NaN in f or its input")
    return gradients, float(solution.relative_residual.max())


def _first(step: TrainingStep, one: Combination, exact: Tensor, limit: float) -> Measured:
    """The first step of a combination: everything but its time. Raises: OutOfTime."""
    cuda = step.device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(step.device)
        before = torch.cuda.memory_allocated(step.device)
    watch = Watch(limit)
    with watch:
        loss, solution = _forward(step, one)
        gradients = _gradients(step, loss)
    peak = torch.cuda.max_memory_allocated(step.device) - before if cuda else watch.peak
    return Measured(
        combination=one,
        nfe=float(solution.nfe.double().mean()),
        vjps=_mean_nfe(solution.backward.stats),
        residual=float(solution.relative_residual.max()),
        converged=float(solution.converged.double().mean()),
        cosine=_cosine(gradients, exact),
        memory=peak,
    )


def _again(step: TrainingStep, measured: Iterable[Measured]) -> None:
    """Add the time of one more step to each."""
    for one in measured:
        begin = _now(step.device)
        loss, _ = _forward(step, one.combination)
        middle = _now(step.device)
        torch.autograd.grad(loss, step.parameters, allow_unused=True)
        one.forward.append(middle - begin)
        one.backward.append(_now(step.device) - middle)


def _forward(step: TrainingStep, one: Combination) -> tuple[Tensor, Solution]:
    # The same dropout masks and estimates in all steps.
    devices = [step.device] if step.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), step.autocast():
        torch.manual_seed(0)
        return step.forward(one.solver, one.adjoint, one.precision)


def _gradients(step: TrainingStep, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, step.parameters, allow_unused=True)
    pairs = zip(found, step.parameters, strict=True)
    flat = [(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs]
    return torch.cat(flat)


def _cosine(gradients: Tensor, exact: Tensor) -> float:
    norms = float(gradients.norm() * exact.norm())
    return float(gradients @ exact) / norms if norms and math.isfinite(norms) else math.nan


def _mean_nfe(stats: SolveStats | None) -> float | None:
    return None if stats is None else float(stats.nfe.double().mean())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
