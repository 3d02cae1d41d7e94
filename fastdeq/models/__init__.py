"""L5: whole networks."""

from fastdeq.models.chain import DEQChain

__all__ = ["DEQChain"]
