"""Experiments; the only package that imports Hydra.

`train` is the command `fastdeq train`. `run` is one experiment: it checks a composed configuration
(`checks`), makes the run folder (`fastdeq.runs`), and starts the processes (`launch`) that do the
work (`job`).
"""

from fastdeq.experiment.command import job
from fastdeq.experiment.curve import Point, curve
from fastdeq.experiment.replay import replay
from fastdeq.experiment.run import run

__all__ = ["Point", "curve", "job", "replay", "run"]
