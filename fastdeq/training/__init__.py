"""Training: LightningModules around built parts, and the callbacks, loggers and DDP strategy that a
run uses.
"""

from fastdeq.extras import extra_for

with extra_for("fastdeq.training"):
    from fastdeq.training.checkpoint_io import SealedCheckpointIO
    from fastdeq.training.checkpoints import checkpoints
    from fastdeq.training.classification import ClassificationTask
    from fastdeq.training.ddp import PayloadDDPStrategy, payload_strategy
    from fastdeq.training.diagnosis import (
        Diagnosis,
        joined,
        measure,
        status_counts,
        trend_of,
        with_norm,
    )
    from fastdeq.training.ending import why_ended
    from fastdeq.training.extension import ExtendedSchedule
    from fastdeq.training.failures import Failures, TrainingFailed
    from fastdeq.training.loggers.console import EpochLines, ProgressBar, table_of
    from fastdeq.training.loggers.metrics_file import MetricsFile
    from fastdeq.training.loggers.plots import LoggerPlots, ShowsPlots
    from fastdeq.training.loss import LossWeights
    from fastdeq.training.plain_data import PlainDataModule
    from fastdeq.training.pretraining import Pretraining
    from fastdeq.training.random_state import set_random_state
    from fastdeq.training.recording import RecordEquilibria
    from fastdeq.training.regression import RegressionTask
    from fastdeq.training.resumption import Resumption, rows_of
    from fastdeq.training.reuse import Reuse
    from fastdeq.training.schedules import (
        AbstractSchedule,
        Constant,
        Cosine,
        LRSchedulerConfig,
        Staircase,
    )
    from fastdeq.training.sigterm import KeepSigtermHandler
    from fastdeq.training.step import BatchResult, StepResult
    from fastdeq.training.task import AbstractTask
    from fastdeq.training.timing import StepTimer

__all__ = [
    "AbstractSchedule",
    "AbstractTask",
    "BatchResult",
    "ClassificationTask",
    "Constant",
    "Cosine",
    "Diagnosis",
    "EpochLines",
    "ExtendedSchedule",
    "Failures",
    "KeepSigtermHandler",
    "LRSchedulerConfig",
    "LoggerPlots",
    "LossWeights",
    "MetricsFile",
    "PayloadDDPStrategy",
    "PlainDataModule",
    "Pretraining",
    "ProgressBar",
    "RecordEquilibria",
    "RegressionTask",
    "Resumption",
    "Reuse",
    "SealedCheckpointIO",
    "ShowsPlots",
    "Staircase",
    "StepResult",
    "StepTimer",
    "TrainingFailed",
    "checkpoints",
    "joined",
    "measure",
    "payload_strategy",
    "rows_of",
    "set_random_state",
    "status_counts",
    "table_of",
    "trend_of",
    "why_ended",
    "with_norm",
]
