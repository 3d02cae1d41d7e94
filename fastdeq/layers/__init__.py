"""L4: equilibrium layers, and what may stand inside a cell."""

from fastdeq.layers.base import AbstractCellLayer
from fastdeq.layers.cells import DenseCell, TwoLayerCell
from fastdeq.layers.deq import DeepEquilibriumNetwork, SkipDeepEquilibriumNetwork
from fastdeq.layers.initialization import Initialization, initialize
from fastdeq.layers.initializers import (
    AbstractInitializer,
    ExplicitNetwork,
    FirstEvaluation,
    Zeros,
)
from fastdeq.layers.multiscale import (
    MultiScaleDeepEquilibriumNetwork,
    MultiScaleSkipDeepEquilibriumNetwork,
)
from fastdeq.layers.multiscale_cell import MultiScaleCell
from fastdeq.layers.residual import (
    MultiScaleExplicitNetwork,
    MultiScaleResidualCell,
    MultiScaleResidualNetwork,
    image_scales,
)
from fastdeq.layers.side_by_side import SideBySideCell, WidthStackedDEQ
from fastdeq.layers.unrolled import UnrolledNetwork
from fastdeq.layers.variational_dropout import VariationalDropout
from fastdeq.layers.weight_norm import weight_norm

__all__ = [
    "AbstractCellLayer",
    "AbstractInitializer",
    "DeepEquilibriumNetwork",
    "DenseCell",
    "ExplicitNetwork",
    "FirstEvaluation",
    "Initialization",
    "MultiScaleCell",
    "MultiScaleDeepEquilibriumNetwork",
    "MultiScaleExplicitNetwork",
    "MultiScaleResidualCell",
    "MultiScaleResidualNetwork",
    "MultiScaleSkipDeepEquilibriumNetwork",
    "SideBySideCell",
    "SkipDeepEquilibriumNetwork",
    "TwoLayerCell",
    "UnrolledNetwork",
    "VariationalDropout",
    "WidthStackedDEQ",
    "Zeros",
    "image_scales",
    "initialize",
    "weight_norm",
]
