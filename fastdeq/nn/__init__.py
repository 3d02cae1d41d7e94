"""Equilibrium layers, cells, whole networks, and baselines in place of equilibria."""

from fastdeq.nn.base import AbstractCellLayer, AbstractSolvingModule
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
from fastdeq.nn.joined import joined
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
from fastdeq.nn.side_by_side import SideBySideCell
from fastdeq.nn.unrolled import UnrolledNetwork
from fastdeq.nn.weight_norm import weight_norm
from fastdeq.nn.width_stacked import Concatenation, WidthStackedDEQ

__all__ = [
    "AbstractCellLayer",
    "AbstractInitializer",
    "AbstractSolvingModule",
    "Concatenation",
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
    "joined",
    "weight_norm",
]
