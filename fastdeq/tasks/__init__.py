"""What is trained: thin LightningModules around built parts."""

from fastdeq.tasks.base import AbstractTask
from fastdeq.tasks.classification import ClassificationTask
from fastdeq.tasks.objective import LossWeights
from fastdeq.tasks.regression import RegressionTask
from fastdeq.tasks.schedules import (
    AbstractSchedule,
    Constant,
    Cosine,
    LRSchedulerConfig,
    Staircase,
)

__all__ = [
    "AbstractSchedule",
    "AbstractTask",
    "ClassificationTask",
    "Constant",
    "Cosine",
    "LRSchedulerConfig",
    "LossWeights",
    "RegressionTask",
    "Staircase",
]
