"""L6: what is trained: thin LightningModules around built parts."""

from fastdeq.tasks.classification import ClassificationTask
from fastdeq.tasks.objective import LossWeights

__all__ = ["ClassificationTask", "LossWeights"]
