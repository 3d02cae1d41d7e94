"""Experiments; the only package that imports Hydra.

`command_line` and `job` are what train.py is made of. `run` is one experiment: it checks a composed
configuration (`checks`), makes the run folder (`fastdeq.runs`), and starts the processes
(`launch`) that do the work (`job`).
"""

from fastdeq.experiment.command import command_line, job
from fastdeq.experiment.replay import replay
from fastdeq.experiment.run import run

__all__ = ["command_line", "job", "replay", "run"]
