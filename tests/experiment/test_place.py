"""What is printed before the jobs of a sweep: which of how many, and the time that is left."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fastdeq.experiment.place import place_of
from tests.experiment.run_folders import write_job, write_run


def heading(sweep: Path, number: int, jobs: int | None, **launcher: Any) -> str:
    hydra = OmegaConf.create(
        {
            "launcher": {"_target_": "hydra._internal.BasicLauncher", **launcher},
            "job": {"num": number},
            "sweep": {"dir": str(sweep)},
        }
    )
    return place_of(hydra, jobs).heading("seed=1")


def test_a_job_is_announced_with_its_place_and_the_time_that_is_left(tmp_path):
    sweep, joblib = tmp_path / "sweep", {"_target_": "x.JoblibLauncher"}
    local = {"_target_": "x.LocalLauncher"}
    assert heading(sweep, 0, 6) == "\njob 0 [1/6]  seed=1"
    assert heading(sweep, 0, None) == "\njob 0 seed=1"
    for number, seconds in enumerate((60.0, 180.0)):
        write_job(sweep, number, write_run(tmp_path / f"run{number}", train_seconds=seconds))
    # The mean of 60 s and 180 s, for each of the 4 jobs that are left
    assert heading(sweep, 2, 6) == "\njob 2 [3/6, about 8 min left]  seed=1"
    # In processes beside others: the number is the prefix of every line.
    assert heading(sweep, 3, 6, **joblib, n_jobs=2) == "[job 3] [4/6, about 4 min left]  seed=1"
    assert heading(sweep, 3, 6, **joblib, n_jobs=-1) == "[job 3] [4/6, about 2 min left]  seed=1"
    assert heading(sweep, 3, 6, **local) == "[job 3] [4/6, about 2 min left]  seed=1"
    # A job that failed counts as ended, and its time is not known.
    write_job(sweep, 2, None, error="out of luck")
    assert heading(sweep, 3, 6) == "\njob 3 [4/6, about 6 min left]  seed=1"
    # The estimate is left out where the folders cannot be read.
    (tmp_path / "run0" / "summary.json").write_text(json.dumps({"format": 9}))
    assert heading(sweep, 3, 6) == "\njob 3 [4/6]  seed=1"
