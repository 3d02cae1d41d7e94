"""L5: whole networks."""

from fastdeq.models.chain import DEQChain
from fastdeq.models.multiscale import MultiScaleHead, MultiScaleStem

__all__ = ["DEQChain", "MultiScaleHead", "MultiScaleStem"]
