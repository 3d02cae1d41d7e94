"""The command ``fastdeq train``, and train.py: Hydra composes conf/, and the run starts."""

import sys
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from fastdeq.commands import CONF
from fastdeq.experiment.command import command_line, job


# An absolute path, since processes of launchers (joblib, submitit) get it with the job.
@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def run(cfg: DictConfig) -> float:
    """Run one experiment; returns its test score (for sweepers)."""
    return job(cfg)


def main(arguments: Sequence[str]) -> int:
    """Compose and run the configuration of the arguments; ends the process after an error."""
    sys.argv[1:] = arguments
    command_line(run)
    return 0
