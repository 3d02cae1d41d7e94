"""L7: what watches a training run."""

from fastdeq.callbacks.checkpoints import BEST, LAST, checkpoints
from fastdeq.callbacks.console import EpochLines, ProgressBar, table_of
from fastdeq.callbacks.pretraining import Pretraining
from fastdeq.callbacks.timing import StepTimer

__all__ = [
    "BEST",
    "LAST",
    "EpochLines",
    "Pretraining",
    "ProgressBar",
    "StepTimer",
    "checkpoints",
    "table_of",
]
