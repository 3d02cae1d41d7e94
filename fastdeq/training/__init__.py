"""Training: LightningModules around built parts, and the callbacks, loggers and DDP strategy that a
run uses.
"""

from fastdeq.training.checkpoint_io import SealedCheckpointIO
from fastdeq.training.checkpoints import BEST, LAST, checkpoints
from fastdeq.training.classification import ClassificationTask
from fastdeq.training.ddp import CarryingDDP, carrying
from fastdeq.training.diagnosis import Diagnosis, course_of, ends, joined, measure, with_norm
from fastdeq.training.failed_step import FAILURE
from fastdeq.training.failures import Failures, TrainingFailed
from fastdeq.training.loggers.console import EpochLines, ProgressBar, table_of
from fastdeq.training.loggers.metrics_file import MetricsFile
from fastdeq.training.loss import LossWeights
from fastdeq.training.pretraining import Pretraining
from fastdeq.training.random_state import set_random_state
from fastdeq.training.regression import RegressionTask
from fastdeq.training.resumption import BEFORE, RESUME, Interrupted, Resumption, rows_of
from fastdeq.training.schedules import (
    AbstractSchedule,
    Constant,
    Cosine,
    LRSchedulerConfig,
    Staircase,
)
from fastdeq.training.task import AbstractTask
from fastdeq.training.timing import StepTimer

__all__ = [
    "BEFORE",
    "BEST",
    "FAILURE",
    "LAST",
    "RESUME",
    "AbstractSchedule",
    "AbstractTask",
    "CarryingDDP",
    "ClassificationTask",
    "Constant",
    "Cosine",
    "Diagnosis",
    "EpochLines",
    "Failures",
    "Interrupted",
    "LRSchedulerConfig",
    "LossWeights",
    "MetricsFile",
    "Pretraining",
    "ProgressBar",
    "RegressionTask",
    "Resumption",
    "SealedCheckpointIO",
    "Staircase",
    "StepTimer",
    "TrainingFailed",
    "carrying",
    "checkpoints",
    "course_of",
    "ends",
    "joined",
    "measure",
    "rows_of",
    "set_random_state",
    "table_of",
    "with_norm",
]
