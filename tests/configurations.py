"""Configurations of conf/ as train.py composes them."""

from pathlib import Path

from omegaconf import DictConfig

from fastdeq.experiment import parts

CONF = Path(__file__).parents[1] / "conf"
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in CONF.iterdir()
    if folder.is_dir() and folder.name != "hydra"
}
NEEDS = {"model=neural_ode": "torchdiffeq", "data=image_folder": "PIL"}
"""Choices that need an extra that tests can do without."""


def composed(*overrides: str) -> DictConfig:
    """The job's configuration as train.py would see it."""
    return parts.composed(overrides)
