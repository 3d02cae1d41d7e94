"""Cells that couple the samples of a batch, and the settings that they need."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdeq.adjoints import AbstractAdjoint, Direct, Implicit, Shine
from fastdeq.krylov import GMRES
from fastdeq.solvers import AbstractSolver


def coupling(cell: nn.Module) -> str | None:
    """The first batch norm in the cell that always uses the batch's own statistics, by its class
    and name; None where there is none (one with running statistics couples in training only)."""
    for name, module in cell.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            return f"{type(module).__name__} '{name}'"
    return None


def check_coupling(cell: nn.Module, solver: AbstractSolver, adjoint: AbstractAdjoint) -> None:
    """Refuse per-sample solves where the samples have no equilibria of their own.

    Raises: ValueError that names the setting to change.
    """
    found = coupling(cell)
    if found is None:
        return
    parts: dict[str, AbstractSolver | GMRES | Direct | Shine] = {"solver": solver}
    if isinstance(adjoint, Implicit):
        parts["adjoint.solver"] = adjoint.solver
    elif isinstance(adjoint, Direct | Shine):
        parts["adjoint"] = adjoint
    for name, part in parts.items():
        if part.per_sample:
            raise ValueError(
                f"the cell normalizes by batch statistics ({found}), which couples the samples of "
                f"a batch: set {name}.per_sample=false, or use group norm in the cell"
            )
