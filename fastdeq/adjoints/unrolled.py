"""Backpropagation through the solver, as a reference and a baseline."""

import warnings

import torch
from torch import Tensor

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium
from fastdeq.notation import FlatMap
from fastdeq.settings import settings
from fastdeq.solution import Recording, SolveResult, Status
from fastdeq.solvers import AbstractSolver, solve
from fastdeq.transforms import Transforms, plain, transformed


@settings
class Unrolled(AbstractAdjoint):
    """The gradient of the iteration itself, through all its steps and into z0.

    Equals the implicit one in the limit of a tight solve. Memory grows with the steps.

    Derivatives of any order, and in forward mode, where the operations of f have them. The fused
    kernels of scaled dot-product attention have first derivatives in reverse mode only: for others,
    call it under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.

    Raises: ValueError for a solver whose steps autograd cannot run through (NewtonKrylov). Warns
    (RuntimeWarning) where a sample diverged: its steps' derivatives may not be finite.
    """

    def check(self, solver: AbstractSolver) -> None:
        """Refuse a solver that autograd cannot run through."""
        if not solver.differentiable:
            raise ValueError(
                f"Unrolled cannot backpropagate through {type(solver).__name__}: use the Implicit "
                "adjoint with it, or unroll Picard, Anderson or LimitedMemoryBroydenSolver"
            )

    def equilibrium(
        self, f: FlatMap, z0: Tensor, solver: AbstractSolver, record: Recording
    ) -> Equilibrium:
        if transformed() and Transforms().mapped:
            raise RuntimeError(
                "the Unrolled adjoint does not work under torch.vmap together with a derivative of "
                "torch.func: use the Implicit adjoint, or differentiate around torch.vmap"
            )
        return self.close(f, solve(solver, f, z0, trace=record.trace, states=record.steps))

    def close(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        output = f(forward.value)
        # Where f is not finite even there, fixed_point warns.
        lost = (forward.status == Status.DIVERGED) & torch.isfinite(output.detach().sum(dim=1))
        if torch.is_grad_enabled() and bool(plain(lost).any()):
            warnings.warn(
                "a sample diverged, and gradients through its steps may be NaN: use the Implicit "
                "adjoint, or damp the solver",
                RuntimeWarning,
                stacklevel=3,
            )
        return Equilibrium(output, output - forward.value, forward)
