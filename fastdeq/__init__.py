"""fastdeq: deep equilibrium models in PyTorch — solvers × adjoints × layers.

The library needs torch alone, and imports it at the first use of a name below: `fastdeq --help`
starts without. Experiments (`fastdeq.experiment`, `fastdeq.training`, `fastdeq.data`, and
`fastdeq.load`, which returns the model of a run) need the extra `experiment`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdeq.extras import extra_for

if TYPE_CHECKING:
    from fastdeq import adjoints, diagnosis, nn, regularizers, solvers
    from fastdeq._export import export
    from fastdeq._fixed_point import fixed_depth, fixed_point
    from fastdeq.experiment.load import load as load
    from fastdeq.experiment.load import load_task as load_task
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
    "fastdeq.experiment.load": ("load", "load_task"),  # not in __all__: they need an extra
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
    if name not in __all__ and name not in _HOMES:
        raise AttributeError(f"module 'fastdeq' has no attribute {name!r}")
    if name not in _HOMES:
        return import_module(f"fastdeq.{name}")
    with extra_for(f"fastdeq.{name}"):
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__, *_HOMES]
