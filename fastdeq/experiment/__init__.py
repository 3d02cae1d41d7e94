"""Experiments; the only package that imports Hydra.

`train` is the command `fastdeq train`, and `run` is the same in a notebook (`run(["model=deq"])`).
`run_config` is one experiment: it checks a composed configuration
(`checks`), makes the run folder (`fastdeq.runs`), and starts the processes (`launch`) that do the
work (`job`).
"""

from fastdeq.extras import extra_for

with extra_for("fastdeq.experiment"):
    from fastdeq.experiment.command import job
    from fastdeq.experiment.curve import Point, curve
    from fastdeq.experiment.notebook import Result, run
    from fastdeq.experiment.replay import replay
    from fastdeq.experiment.run import run as run_config

__all__ = ["Point", "Result", "curve", "job", "replay", "run", "run_config"]
