"""Solves and training steps of a fixed number of evaluations: with fastdeq, with torchdeq, and the
evaluations and VJPs of f alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import HAS_TORCHDEQ, Case
from fastdeq import GMRES, fixed_point
from fastdeq.adjoints import Implicit
from fastdeq.flatten import scales_of
from fastdeq.notation import State, StateMap
from fastdeq.solvers import AbstractSolver, Anderson, LimitedMemoryBroydenSolver, Picard, solve

NEVER = 1e-30  # a tolerance that no solve meets

SOLVERS: dict[str, type[AbstractSolver]] = {
    "Picard": Picard,
    "Anderson": Anderson,
    "L-Broyden": LimitedMemoryBroydenSolver,
}
THEIRS = {"Picard": "fixed_point_iter", "Anderson": "anderson", "L-Broyden": "broyden"}
"""The same methods in torchdeq."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """z = f(z) from z0. parameters: what f depends on. forward: evaluations of f in a solve.
    backward: VJPs.
    """

    f: StateMap
    z0: State
    parameters: list[Tensor]
    forward: int
    backward: int
    per_sample: bool = True

    def with_forward(self, evaluations: int) -> "Problem":
        """The same with another number of evaluations."""
        return replace(self, forward=evaluations)

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """The state as a tuple."""
        return scales_of(self.z0)

    def evaluations(self) -> None:
        """The evaluations of a solve alone."""
        with torch.no_grad():
            z = self.z0
            for _ in range(self.forward):
                z = self.f(z)

    def passes(self) -> None:
        """The evaluations and VJPs of a training step alone."""
        clear(self.parameters)
        self.evaluations()
        z = tuple(scale.clone().requires_grad_() for scale in self.scales)
        y = self.f(z if isinstance(self.z0, tuple) else z[0])
        output = scales_of(y)
        w = [torch.randn_like(scale) for scale in output]
        for _ in range(self.backward):
            torch.autograd.grad(output, z, w, retain_graph=True)
        torch.autograd.backward(output, w)


def clear(parameters: Iterable[Tensor]) -> None:
    """Remove the gradients of the last step."""
    for parameter in parameters:
        parameter.grad = None


def loss_of(z: State) -> Tensor:
    """Mean squares of all scales."""
    return torch.stack([scale.square().mean() for scale in scales_of(z)]).sum()


def our_solve(name: str, problem: Problem, **settings: Any) -> Case:
    """A forward solve without gradients."""
    z0: Any = problem.z0
    f: Any = problem.f
    solver = _solver(name, problem.forward - 1, problem.per_sample, **settings)
    return torch.no_grad()(lambda: solve(solver, f, z0))


def our_step(name: str, problem: Problem, **settings: Any) -> Case:
    """A training step: L-Broyden with GMRES, the others with themselves."""
    solver = _solver(name, problem.forward - 1, problem.per_sample, **settings)
    steps = {"max_steps": problem.backward, "per_sample": problem.per_sample}
    steps |= {key: value for key, value in settings.items() if key != "memory"}
    adjoint = Implicit(
        solver=GMRES(tol=1e-12, restart=settings.get("memory"), **steps)  # type: ignore[arg-type]
        if name == "L-Broyden"
        else _solver(name, problem.backward, problem.per_sample, **settings)
    )

    def run() -> None:
        clear(problem.parameters)
        solution = fixed_point(problem.f, problem.z0, solver=solver, adjoint=adjoint)
        loss_of(solution.value).backward()

    return run


def _solver(name: str, steps: int, per_sample: bool, **settings: Any) -> AbstractSolver:
    own = {key: value for key, value in settings.items() if key != "memory" or name != "Picard"}
    return SOLVERS[name](tol=NEVER, max_steps=steps, per_sample=per_sample, **own)


def their_solve(name: str, problem: Problem) -> Case | None:
    """The same with torchdeq, where it is installed."""
    if not HAS_TORCHDEQ:
        return None
    deq = _deq(name, problem)
    return torch.no_grad()(partial(deq, *_theirs(problem)))


def their_step(name: str, problem: Problem) -> Case | None:
    """The same with torchdeq, where it is installed."""
    if not HAS_TORCHDEQ:
        return None
    deq = _deq(name, problem)

    def run() -> None:
        clear(problem.parameters)
        out, _ = deq(*_theirs(problem))
        z = out[-1]
        loss_of(z if isinstance(z, Tensor) else tuple(z)).backward()

    return run


def _deq(name: str, problem: Problem) -> Any:
    from torchdeq import get_deq

    method = THEIRS[name]
    forward = {"f_solver": method, "f_max_iter": problem.forward, "f_tol": NEVER}
    backward = {"b_solver": method, "b_max_iter": problem.backward, "b_tol": NEVER}
    return get_deq(ift=True, **forward, **backward)


def _theirs(problem: Problem) -> tuple[Callable[..., Any], Any]:
    """Function and start as torchdeq takes them: several scales are a list."""
    if isinstance(problem.z0, Tensor):
        return problem.f, problem.z0
    return (lambda *z: list(problem.f(z))), list(problem.z0)
