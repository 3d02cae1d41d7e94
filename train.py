"""Train what conf/ composes: `python train.py model=skip_deq data=digits solver.tol=1e-3`.

`python train.py --help` says what can be chosen.
"""

import hydra
from omegaconf import DictConfig

from fastdeq import experiment


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run one experiment; returns its test score (for sweepers)."""
    return experiment.job(cfg)


if __name__ == "__main__":
    experiment.command_line(main)
