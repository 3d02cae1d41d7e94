"""fastdeq: deep equilibrium models in PyTorch — solvers × adjoints × layers.

The library needs torch alone, and imports it at the first use of a name below: `fastdeq --help`
starts without. Experiments (`fastdeq.experiment`, `fastdeq.training`, `fastdeq.data`) need the
extra `experiment`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdeq import adjoints, diagnosis, nn, regularizers, solvers
    from fastdeq._export import export
    from fastdeq._fixed_point import fixed_depth, fixed_point
    from fastdeq.krylov import GMRES, gmres
    from fastdeq.nn import (
        DeepEquilibriumNetwork,
        DEQChain,
        MultiScaleDeepEquilibriumNetwork,
        MultiScaleSkipDeepEquilibriumNetwork,
        SkipDeepEquilibriumNetwork,
        WidthStackedDEQ,
    )
    from fastdeq.solution import Solution, SolveStats, Status

__version__ = "0.1.0"

__all__ = [
    "GMRES",
    "DEQChain",
    "DeepEquilibriumNetwork",
    "MultiScaleDeepEquilibriumNetwork",
    "MultiScaleSkipDeepEquilibriumNetwork",
    "SkipDeepEquilibriumNetwork",
    "Solution",
    "SolveStats",
    "Status",
    "WidthStackedDEQ",
    "adjoints",
    "diagnosis",
    "export",
    "fixed_depth",
    "fixed_point",
    "gmres",
    "nn",
    "regularizers",
    "solvers",
]

_MODULES = {
    "fastdeq._export": ("export",),
    "fastdeq._fixed_point": ("fixed_depth", "fixed_point"),
    "fastdeq.krylov": ("GMRES", "gmres"),
    "fastdeq.nn": (
        "DEQChain",
        "DeepEquilibriumNetwork",
        "MultiScaleDeepEquilibriumNetwork",
        "MultiScaleSkipDeepEquilibriumNetwork",
        "SkipDeepEquilibriumNetwork",
        "WidthStackedDEQ",
    ),
    "fastdeq.solution": ("Solution", "SolveStats", "Status"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in __all__:
        raise AttributeError(f"module 'fastdeq' has no attribute {name!r}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    return import_module(f"fastdeq.{name}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
