"""fastdeq: deep equilibrium models in PyTorch — solvers × adjoints × layers.

The library needs torch alone. Experiments (`fastdeq.experiment`, `fastdeq.training`,
`fastdeq.data`) need the extra `experiment` and are not imported here.
"""

from fastdeq import adjoints, nn, regularizers, solvers
from fastdeq.fixed_point import fixed_depth, fixed_point
from fastdeq.krylov import GMRES, gmres
from fastdeq.nn import (
    DeepEquilibriumNetwork,
    DEQChain,
    MultiScaleDeepEquilibriumNetwork,
    MultiScaleSkipDeepEquilibriumNetwork,
    SkipDeepEquilibriumNetwork,
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
    "adjoints",
    "fixed_depth",
    "fixed_point",
    "gmres",
    "nn",
    "regularizers",
    "solvers",
]
