"""Tab completion of ``fastdeq train``, without torch: Hydra composes conf/ and nothing else."""

import sys
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from fastdeq.commands import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _compose(cfg: DictConfig) -> None:
    """Hydra composes and prints for its flag -sc before it would call this."""


def main(arguments: Sequence[str]) -> int:
    """Print what Hydra's flag -sc asks for: the shell's script, or the words that come next."""
    sys.argv[1:] = arguments
    _compose()
    return 0
