"""Continuous equilibrium models: dz/dt = f(z) − z, integrated until it rests."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.continuous.adams import AdamsBashforth3
from fastdeq.solvers.continuous.runge_kutta import RungeKutta, Trial
from fastdeq.solvers.continuous.tableaux import BS3, TSIT5
from fastdeq.solvers.termination import Iterate

METHODS: dict[str, RungeKutta | AdamsBashforth3] = {
    "tsit5": RungeKutta(TSIT5),
    "bs3": RungeKutta(BS3),
    "vcab3": AdamsBashforth3(),
}

_SAFETY = 0.9
_SMALLEST_CHANGE, _LARGEST_CHANGE = 0.2, 5.0
_MOVEMENT = 0.2  # bound of the error of a step, relative to its length


@dataclass(frozen=True)
class _Clock:
    """Per sample, each (B,): the step size to try, and the last accepted error (for PI control)."""

    h: Tensor
    error: Tensor
    memory: Any


@settings
class ContinuousSolver(AbstractSolver):
    """Integrate dz/dt = f(z) − z from z0 until f(z) = z to the tolerance of the termination test
    (Pal et al. 2022, arXiv 2201.12240), with its own time and step size for every sample.

    method: `tsit5` (order 5, six evaluations per step), `bs3` (order 3, three) or `vcab3` (order 3,
        one once started, with a narrower range of stable steps).
    ode_tol: tolerance of the local error, absolute and relative; None: `tol`. A path to a steady
        state has to be stable, not accurate, and departure 1 keeps it stable. At 0.5 a solve
        takes about as few evaluations as at any value: a fifth to three quarters of those at
        `ode_tol` = `tol`, for `tol` from 1e-5 to 1e-3. Lower it to follow the flow closely, as
        published runs do, or where solves diverge because the slope of f rises steeply on the way.
    first_step: initial step size; None estimates it from the slope at z0.
    min_step: a sample that would need smaller steps is stalled, or diverged where f is not finite.

    A rejected step counts as a step.

    Departures from the references:
    1. The error of a step is also bounded by a fifth of the step's length. Near the equilibrium the
       error tolerance is not active, steps would grow to the edge of stability, and the residual
       would not fall below the tolerance; the bound keeps steps in the stable range.
    2. The first step is estimated without evaluating f: the usual estimate (Hairer, Nørsett &
       Wanner, Solving ODEs I, §II.4) takes the time scale from ‖z0‖, which is 0 for most
       equilibrium models; here it is 1.
    3. Adams–Bashforth steps are accepted or rejected before f is evaluated at their end: rejecting
       one is free.
    """

    method: Literal["tsit5", "bs3", "vcab3"] = setting(default="tsit5")
    ode_tol: float | None = setting(default=0.5, above=0)
    first_step: float | None = setting(default=None, above=0)
    min_step: float = setting(default=1e-8, above=0)

    @property
    def compiles_steps(self) -> bool:  # type: ignore[override]  # a method's, not the class's
        """Adams–Bashforth looks at every step which samples are still started by BS3."""
        return self.method != "vcab3"

    def init(self, problem: Problem, first: Iterate) -> _Clock:
        ones = torch.ones_like(first.z[:, 0]).detach()
        h = ones * self.first_step if self.first_step else self._first_step(problem, first).detach()
        return _Clock(h, ones, METHODS[self.method].start(first))

    def step(self, problem: Problem, current: Iterate, memory: _Clock) -> tuple[Step, _Clock]:
        method = METHODS[self.method]
        trial = method.propose(problem, current, memory.h, memory.memory)
        with torch.no_grad():
            ratio = self._error_ratio(problem, current, trial.end.z, trial.error)
            accept = ratio <= 1  # False for NaN
            h = memory.h * self._change(ratio, memory.error, accept, method.order)
            stuck = problem.active & ~accept & (h < self.min_step)
            # Per row: one bad sample must not end those that share its step size.
            lost = stuck & ~torch.isfinite((trial.end.z + trial.error).sum(dim=1))
        end = _closed(problem, trial, accept)
        rows = accept[:, None]
        moved = Iterate(
            torch.where(rows, end.z, current.z),
            torch.where(rows, end.g, current.g).masked_fill(lost[:, None], torch.nan),
        )
        past = method.accepted(memory.memory, current, memory.h, accept)
        error = torch.where(accept, ratio.clamp(min=1e-4), memory.error)
        stalled = stuck & torch.isfinite(ratio)
        return Step(moved, stalled=stalled), _Clock(h, error, past)

    def _error_ratio(self, problem: Problem, at: Iterate, end: Tensor, error: Tensor) -> Tensor:
        """The local error relative to its bound, (B,); a step is accepted up to 1."""
        tol = self.ode_tol or self.tol
        scaled = problem.norm(error / (tol + tol * torch.maximum(at.z.abs(), end.abs())))
        size = problem.pooling.length(at.z) ** 0.5
        movement = problem.norm(end - at.z).clamp(min=torch.finfo(end.dtype).tiny)
        return torch.maximum(scaled / size, problem.norm(error) / (_MOVEMENT * movement))

    def _change(self, ratio: Tensor, last: Tensor, accept: Tensor, order: int) -> Tensor:
        """The factor on the step size, (B,): PI control (Hairer & Wanner, ODEs II, §IV.2)."""
        ratio = torch.nan_to_num(ratio, nan=torch.inf).clamp(min=1e-10)
        factor = _SAFETY * ratio ** (-0.7 / order) * last ** (0.4 / order)
        plain = _SAFETY * ratio ** (-1 / order)
        factor = torch.where(accept, factor, plain.clamp(max=_SAFETY))
        return factor.clamp(_SMALLEST_CHANGE, _LARGEST_CHANGE)

    def _first_step(self, problem: Problem, first: Iterate) -> Tensor:
        """An estimate from the slope at z0, (B,): at most 1, the time scale of dz/dt = f(z) − z."""
        tol, order = self.ode_tol or self.tol, METHODS[self.method].order
        size = problem.pooling.length(first.z) ** 0.5
        slope = problem.norm(first.g / (tol + tol * first.z.abs())) / size
        h: Tensor = (1 / slope).clamp(max=1.0) ** (1 / order)
        return h


def _closed(problem: Problem, trial: Trial, accept: Tensor) -> Iterate:
    """The end of the trial with its derivative, evaluated where the method has not."""
    if trial.known is None:
        return trial.end
    missing = problem.active & accept & ~trial.known
    if not bool(missing.any()):  # waits for the device; saves an evaluation of f
        return trial.end
    end, rows = problem.evaluate(trial.end.z, missing), missing[:, None]
    return Iterate(torch.where(rows, end.z, trial.end.z), torch.where(rows, end.g, trial.end.g))
