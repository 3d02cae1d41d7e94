"""L7: what watches a training run."""

from fastdeq.callbacks.console import EpochLines
from fastdeq.callbacks.timing import StepTimer

__all__ = ["EpochLines", "StepTimer"]
