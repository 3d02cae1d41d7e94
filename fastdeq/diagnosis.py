"""What can be measured of a map f at an equilibrium: does it contract, and is z* the only one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeq._fixed_point import fixed_point, flat_map
from fastdeq.adjoints import JacobianFree
from fastdeq.autodiff import jvp, unfused_attention, vjp
from fastdeq.flatten import Layout
from fastdeq.norms import sample_norm
from fastdeq.notation import State, StateMap
from fastdeq.regularizers import check_can_differentiate, spectral_radius
from fastdeq.settings import check_value
from fastdeq.solvers import AbstractSolver, LimitedMemoryBroydenSolver

__all__ = ["MultiStart", "contraction", "multi_start", "spectral_radius"]


def contraction(f: StateMap, z: State, *, iterations: int = 30) -> Tensor:
    """‖J‖₂ at z for every sample, (B,): the largest singular value of J = ∂f/∂z, by the power
    method on JᵀJ, from below.

    Below 1, f contracts near z: Picard iteration reduces the distance to the equilibrium at every
    step (the spectral radius says so of many steps). Two products per iteration, one with J, in
    forward mode. The result has no derivatives.

    Raises: ValueError for iterations below 1; RuntimeError in inference mode, and
    NotImplementedError for operations in f without forward mode.
    """
    check_can_differentiate("contraction")
    check_value("iterations", iterations, int, {"at least": 1})
    layout = Layout.of(z, "z")
    flat_f = flat_map(f, layout)
    with unfused_attention():
        with torch.enable_grad():
            at = layout.flatten(z).detach().requires_grad_()
            output = flat_f(at)
        v, norm = torch.randn_like(at), torch.zeros_like(at[:, 0])
        for _ in range(iterations):
            v = v / sample_norm(v).clamp(min=torch.finfo(v.dtype).tiny)[:, None]
            u = jvp(flat_f, at.detach(), v).detach()
            norm = sample_norm(u)
            v = vjp(output, at, u)
    return norm.detach()


@dataclass(frozen=True, kw_only=True)
class MultiStart:
    """The equilibria that were found from several starts, per sample.

    several: (B,) bool, whether two of them differ. converged: (B,) int64, from how many starts one
    was found. distance: (B,) the largest distance of two of them, relative to their norm; 0 where
    fewer than two were found.
    """

    several: Tensor
    converged: Tensor
    distance: Tensor


@torch.no_grad()
def multi_start(
    f: StateMap,
    z0: State,
    *,
    starts: int = 8,
    std: float = 1.0,
    separation: float = 1e-2,
    solver: AbstractSolver | None = None,
) -> MultiStart:
    """Solve z = f(z) from z0 and from starts − 1 random ones, z0 + std · N(0, I), and compare.

    separation: relative distance from which two equilibria count as different. It must be well
        above tol · ‖(I − J)⁻¹‖, the distance at which two solves may end beside the same one.
    solver: by default limited-memory Broyden with tol=1e-6 and max_steps=200, which also finds
        equilibria that Picard iteration leaves.

    That one equilibrium was found does not prove that there is no other.

    Raises: as `fixed_point`; also TypeError and ValueError for starts below 2, and for a std or a
    separation that is not above 0.
    """
    check_value("starts", starts, int, {"at least": 2})
    check_value("std", std, float, {"above": 0})
    check_value("separation", separation, float, {"above": 0})
    solver = LimitedMemoryBroydenSolver(tol=1e-6, max_steps=200) if solver is None else solver
    layout = Layout.of(z0)
    first = layout.flatten(z0)
    values, converged = [], []
    for i in range(starts):
        start = first + std * torch.randn_like(first) if i else first
        solution = fixed_point(f, layout.unflatten(start), solver=solver, adjoint=JacobianFree())
        values.append(layout.flatten(solution.value))
        converged.append(solution.converged)
    found, z = torch.stack(converged), torch.stack(values)  # (starts, B), (starts, B, D)
    distance = torch.zeros_like(first[:, 0])
    for i in range(1, starts):
        apart = torch.linalg.vector_norm(z[i] - z[:i], dim=2)
        size = torch.linalg.vector_norm(z[: i + 1], dim=2).amax(dim=0)
        relative = (apart / size).masked_fill(~(found[i] & found[:i]) | (apart == 0), 0.0)
        distance = torch.maximum(distance, relative.amax(dim=0))
    return MultiStart(several=distance > separation, converged=found.sum(dim=0), distance=distance)
