"""fastdeq: deep equilibrium models in PyTorch — solvers × adjoints × layers.

The library needs torch alone. Experiments (`fastdeq.experiment`, `fastdeq.tasks`, `fastdeq.data`)
need the extra `experiment` and are not imported here.
"""

from fastdeq import adjoints, layers, models, regularizers, solvers
from fastdeq.fixed_point import fixed_depth, fixed_point
from fastdeq.krylov import GMRES, gmres
from fastdeq.layers import (
    DeepEquilibriumNetwork,
    MultiScaleDeepEquilibriumNetwork,
    MultiScaleSkipDeepEquilibriumNetwork,
    SkipDeepEquilibriumNetwork,
)
from fastdeq.models import DEQChain
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
    "layers",
    "models",
    "regularizers",
    "solvers",
]
