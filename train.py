"""Train what conf/ composes: `python train.py model=skip_deq data=digits solver.tol=1e-3`."""

import hydra
from omegaconf import DictConfig

from fastdeq import experiment


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run one experiment; returns its test accuracy (for sweepers)."""
    return experiment.run(cfg)


if __name__ == "__main__":
    main()
