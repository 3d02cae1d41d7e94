"""The symbols and axes used everywhere, and their type aliases.

| symbol        | meaning                                                                        |
|---------------|--------------------------------------------------------------------------------|
| `f`           | the cell, with its input bound: z ↦ f(z, x)                                    |
| `x`           | the input that is injected into every evaluation of the cell                   |
| `z`           | a state; inside solvers and adjoints always one flat (B, D) tensor             |
| `z0`          | the initial state of the solver                                                |
| `z_star`      | the equilibrium, z* = f(z*, x)                                                 |
| `g`           | the residual f(z) − z, which is also dz/dt of a continuous model               |
| `J`           | ∂f/∂z at z*                                                                    |
| `w`, `v`      | the incoming cotangent, and the solution of (I − Jᵀ) v = w                     |
| `nfe`         | evaluations of f in the forward solve, the closing one included                |
| `tol`         | tolerance of the termination test, absolute and relative                       |
| `B`           | batch: the first axis of every state                                           |
| `D`           | all entries of one sample, over all its scales                                 |
| `m`, `k`      | memory of a quasi-Newton or Krylov method, and how much of it is in use        |
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

State: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a user's f takes and returns: a (B, ...) tensor, or one (B, ...) tensor per scale, in a
tuple or by name."""

StateMap: TypeAlias = Callable[[Any], State]
"""The user's f with its input bound, z ↦ f(z, x): takes a state of the structure of z0."""

FlatMap: TypeAlias = Callable[[Tensor], Tensor]
"""The same map on flat states, (B, D) → (B, D): what solvers and adjoints see."""
