"""Which messages of Lightning a run prints."""

import logging
import warnings

from fastdeq.runs.log import LOG


def hear_lightning() -> None:
    """Suppress the banner and the advice of Lightning that do not apply here; other warnings, and
    what its callbacks and profilers report, are logged.
    """
    # The banner (hardware, available loggers) is replaced by the lines of `announce`.
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("pytorch_lightning.callbacks", "pytorch_lightning.profilers"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [_ToLog()]
    for message in (
        "Experiment logs directory",  # the folder is new, and config.yaml is in it first
        "Checkpoint directory",  # likewise
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning 2.6 on torch 2.13
        ".*does not have many workers",  # batches are cut from memory
        "It is recommended to use `self.log",  # the tasks' means are synchronized already
        "`ModelCheckpoint\\(monitor=",  # a run that stops before its first validation: conclude
        "The `srun` command is available",  # whether it is used is known (cluster.current_step)
        "The number of training batches",  # fewer in an epoch than log_every_n_steps
    ):
        warnings.filterwarnings("ignore", message=message)


class _ToLog(logging.Handler):
    """Passes messages to the log of the run."""

    def emit(self, record: logging.LogRecord) -> None:
        LOG.log(record.levelno, "%s", record.getMessage())
