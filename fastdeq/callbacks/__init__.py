"""What watches a training run."""

from fastdeq.callbacks.carrying import CarryingDDP, carrying
from fastdeq.callbacks.checkpoints import BEST, LAST, checkpoints
from fastdeq.callbacks.console import EpochLines, ProgressBar, table_of
from fastdeq.callbacks.diagnosis import Diagnosis, course_of, ends, joined, measure, with_norm
from fastdeq.callbacks.failed_step import FAILURE
from fastdeq.callbacks.failures import Failures, TrainingFailed
from fastdeq.callbacks.metrics_file import MetricsFile
from fastdeq.callbacks.pretraining import Pretraining
from fastdeq.callbacks.ranks import set_random_state
from fastdeq.callbacks.resumption import BEFORE, RESUME, Interrupted, Resumption, rows_of
from fastdeq.callbacks.storage import SealedCheckpointIO, is_sealed, seal_of, write_whole
from fastdeq.callbacks.timing import StepTimer

__all__ = [
    "BEFORE",
    "BEST",
    "FAILURE",
    "LAST",
    "RESUME",
    "CarryingDDP",
    "Diagnosis",
    "EpochLines",
    "Failures",
    "Interrupted",
    "MetricsFile",
    "Pretraining",
    "ProgressBar",
    "Resumption",
    "SealedCheckpointIO",
    "StepTimer",
    "TrainingFailed",
    "carrying",
    "checkpoints",
    "course_of",
    "ends",
    "is_sealed",
    "joined",
    "measure",
    "rows_of",
    "seal_of",
    "set_random_state",
    "table_of",
    "with_norm",
    "write_whole",
]
