"""Equilibria of several scales (MDEQ; Bai et al. 2020, arXiv 2006.08656)."""

from fastdeq.nn.multiscale.cell import MultiScaleCell
from fastdeq.nn.multiscale.deq import (
    MultiScaleDeepEquilibriumNetwork,
    MultiScaleSkipDeepEquilibriumNetwork,
)
from fastdeq.nn.multiscale.networks import MultiScaleHead, MultiScaleStem
from fastdeq.nn.multiscale.residual import (
    MultiScaleExplicitNetwork,
    MultiScaleResidualCell,
    MultiScaleResidualNetwork,
    image_scales,
)

__all__ = [
    "MultiScaleCell",
    "MultiScaleDeepEquilibriumNetwork",
    "MultiScaleExplicitNetwork",
    "MultiScaleHead",
    "MultiScaleResidualCell",
    "MultiScaleResidualNetwork",
    "MultiScaleSkipDeepEquilibriumNetwork",
    "MultiScaleStem",
    "image_scales",
]
