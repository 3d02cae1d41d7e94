"""Train what conf/ composes: `python train.py model=skip_deq data=digits solver.tol=1e-3`.

`python train.py --help` says what can be chosen.
"""

import signal

# They ask a run to stop, and may come while torch is still being imported: they wait until the run
# listens, instead of ending the process.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from fastdeq import experiment  # noqa: E402


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run one experiment; returns its test score (for sweepers)."""
    return experiment.job(cfg)


if __name__ == "__main__":
    experiment.command_line(main)
