"""L7: what watches a training run."""

from fastdeq.callbacks.checkpoints import BEST, LAST, checkpoints
from fastdeq.callbacks.console import EpochLines, ProgressBar, table_of
from fastdeq.callbacks.metrics_file import MetricsFile
from fastdeq.callbacks.pretraining import Pretraining
from fastdeq.callbacks.resumption import BEFORE, RESUME, Interrupted, Resumption, rows_of
from fastdeq.callbacks.storage import SealedCheckpointIO, is_sealed, seal_of
from fastdeq.callbacks.timing import StepTimer

__all__ = [
    "BEFORE",
    "BEST",
    "LAST",
    "RESUME",
    "EpochLines",
    "Interrupted",
    "MetricsFile",
    "Pretraining",
    "ProgressBar",
    "Resumption",
    "SealedCheckpointIO",
    "StepTimer",
    "checkpoints",
    "is_sealed",
    "rows_of",
    "seal_of",
    "table_of",
]
