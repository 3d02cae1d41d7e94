"""Equilibrium layers, cells, whole networks, and baselines in place of equilibria."""

from fastdeq.nn.base import AbstractCellLayer
from fastdeq.nn.cells import DenseCell, TwoLayerCell
from fastdeq.nn.chain import DEQChain
from fastdeq.nn.deq import DeepEquilibriumNetwork, SkipDeepEquilibriumNetwork
from fastdeq.nn.dropout import VariationalDropout
from fastdeq.nn.initialization import Initialization, initialize
from fastdeq.nn.initializers import (
    AbstractInitializer,
    ExplicitNetwork,
    FirstEvaluation,
    RandomNormal,
    Zeros,
)
from fastdeq.nn.multiscale import (
    MultiScaleCell,
    MultiScaleDeepEquilibriumNetwork,
    MultiScaleExplicitNetwork,
    MultiScaleHead,
    MultiScaleResidualCell,
    MultiScaleResidualNetwork,
    MultiScaleSkipDeepEquilibriumNetwork,
    MultiScaleStem,
    image_scales,
)
from fastdeq.nn.random_steps import RandomSteps
from fastdeq.nn.side_by_side import SideBySideCell, WidthStackedDEQ
from fastdeq.nn.unrolled import UnrolledNetwork
from fastdeq.nn.weight_norm import weight_norm

__all__ = [
    "AbstractCellLayer",
    "AbstractInitializer",
    "DEQChain",
    "DeepEquilibriumNetwork",
    "DenseCell",
    "ExplicitNetwork",
    "FirstEvaluation",
    "Initialization",
    "MultiScaleCell",
    "MultiScaleDeepEquilibriumNetwork",
    "MultiScaleExplicitNetwork",
    "MultiScaleHead",
    "MultiScaleResidualCell",
    "MultiScaleResidualNetwork",
    "MultiScaleSkipDeepEquilibriumNetwork",
    "MultiScaleStem",
    "RandomNormal",
    "RandomSteps",
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
