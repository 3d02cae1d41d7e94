"""L4: equilibrium layers, and what may stand inside a cell."""

from fastdeq.layers.base import AbstractCellLayer
from fastdeq.layers.cells import DenseCell, TwoLayerCell
from fastdeq.layers.deq import DeepEquilibriumNetwork, SkipDeepEquilibriumNetwork
from fastdeq.layers.initializers import (
    AbstractInitializer,
    ExplicitNetwork,
    FirstEvaluation,
    Zeros,
)
from fastdeq.layers.multiscale import (
    MultiScaleCell,
    MultiScaleDeepEquilibriumNetwork,
    MultiScaleSkipDeepEquilibriumNetwork,
)
from fastdeq.layers.residual import (
    MultiScaleExplicitNetwork,
    MultiScaleResidualCell,
    MultiScaleResidualNetwork,
    image_scales,
)
from fastdeq.layers.variational_dropout import VariationalDropout
from fastdeq.layers.weight_norm import weight_norm

__all__ = [
    "AbstractCellLayer",
    "AbstractInitializer",
    "DeepEquilibriumNetwork",
    "DenseCell",
    "ExplicitNetwork",
    "FirstEvaluation",
    "MultiScaleCell",
    "MultiScaleDeepEquilibriumNetwork",
    "MultiScaleExplicitNetwork",
    "MultiScaleResidualCell",
    "MultiScaleResidualNetwork",
    "MultiScaleSkipDeepEquilibriumNetwork",
    "SkipDeepEquilibriumNetwork",
    "TwoLayerCell",
    "VariationalDropout",
    "Zeros",
    "image_scales",
    "weight_norm",
]
