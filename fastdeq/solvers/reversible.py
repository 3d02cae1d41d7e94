"""The relaxed iteration on two sequences, whose steps can be run backwards."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdeq.autodiff import is_recorded
from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.termination import Iterate


@dataclass
class Pairs:
    """What a solve keeps of its two sequences.

    y, z: (B, D), in float64, after the last step; a sample that has ended keeps its last ones.
    active: for every step, which samples took it, (B,). kept: the pair after some of the steps.
    Both are empty where no derivatives are recorded.
    """

    y: Tensor
    z: Tensor
    active: list[Tensor] = field(default_factory=list)
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@settings
class ReversibleSolver(AbstractSolver):
    """y ← (1 − β) y + β f(z), then z ← (1 − β) z + β f(y), from y = z = z0 (arXiv 2509.12917).

    damping: β in (0, 1]; the `Reversible` adjoint needs β below 1.
    keep_every: every this many steps, the pair (y, z) is kept for that adjoint. Run backwards, a
        step multiplies rounding by up to 1 / (1 − β)², so that only so many steps are
        reconstructed from the last pair: with β = 0.8 about 5 in float64 and 9 in float32, with
        β = 0.5 about 12 and 18. None keeps nothing: memory does not grow with the steps.

    Converges where f is a contraction. Two evaluations per step; y and z are kept in float64,
    whatever the dtype of the state.
    """

    damping: float = setting(default=0.8, above=0, at_most=1)
    keep_every: int | None = setting(default=5, at_least=1)

    def init(self, problem: Problem, first: Iterate) -> Pairs:
        wide = first.z.double()
        return Pairs(wide, wide)

    def step(self, problem: Problem, current: Iterate, memory: Pairs) -> tuple[Step, Pairs]:
        y = self.relaxed(memory.y, image(current))
        z = self.relaxed(memory.z, image(problem.evaluate(y.to(current.z.dtype))))
        new = problem.evaluate(z.to(current.z.dtype))
        if not problem.all_active:
            rows = problem.active[:, None]
            y, z = torch.where(rows, y, memory.y), torch.where(rows, z, memory.z)
        memory.y, memory.z = y, z
        if is_recorded(z):
            memory.active.append(problem.active)
            if self.keep_every and len(memory.active) % self.keep_every == 0:
                memory.kept[len(memory.active)] = y.detach(), z.detach()
        return Step(new), memory

    def relaxed(self, v: Tensor, image: Tensor) -> Tensor:
        """(1 − β) v + β f, in float64."""
        return torch.add((1 - self.damping) * v, image, alpha=self.damping)

    def unrelaxed(self, v: Tensor, image: Tensor) -> Tensor:
        """The v of which `relaxed` made this one."""
        return torch.add(v, image, alpha=-self.damping) / (1 - self.damping)


def image(at: Iterate) -> Tensor:
    """f(z) in float64, from z and f(z) − z: a reconstruction has to round as the solve did."""
    return (at.z + at.g).double()
