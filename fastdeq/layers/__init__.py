"""L4: equilibrium layers, and what may stand inside a cell."""

from fastdeq.layers.cells import DenseCell, TwoLayerCell
from fastdeq.layers.deq import DeepEquilibriumNetwork, SkipDeepEquilibriumNetwork
from fastdeq.layers.initializers import (
    AbstractInitializer,
    ExplicitNetwork,
    FirstEvaluation,
    Zeros,
)
from fastdeq.layers.variational_dropout import VariationalDropout
from fastdeq.layers.weight_norm import weight_norm

__all__ = [
    "AbstractInitializer",
    "DeepEquilibriumNetwork",
    "DenseCell",
    "ExplicitNetwork",
    "FirstEvaluation",
    "SkipDeepEquilibriumNetwork",
    "TwoLayerCell",
    "VariationalDropout",
    "Zeros",
    "weight_norm",
]
