"""The parts of a composed configuration, to be measured: the task, one batch, and the solvers and
adjoints that could be chosen."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastdeq.adjoints import AbstractAdjoint
from fastdeq.autocast import Precision
from fastdeq.commands import CONF
from fastdeq.experiment.build import build_data, build_task
from fastdeq.experiment.checkpoint import load_weights
from fastdeq.experiment.choices import check_choices, with_merged_groups
from fastdeq.experiment.command import with_saved_overrides
from fastdeq.experiment.job import make_trainer
from fastdeq.experiment.renamed import check_renamed
from fastdeq.experiment.run import check
from fastdeq.runs.folder import LAST
from fastdeq.solvers import AbstractSolver
from fastdeq.training import AbstractTask
from fastdeq.training.task import Batch


@dataclass(frozen=True)
class Choices:
    """The solvers and adjoints of conf/ under the settings of a configuration, by name, with the
    chosen ones first; and the chosen precision of f. refused: why a file could not be used, by
    `group=name`.
    """

    solvers: dict[str, AbstractSolver]
    adjoints: dict[str, AbstractAdjoint]
    precision: Precision | None
    refused: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The task and one training batch on the trainer's device.

    autocast: makes the context of a training step (trainer.precision).
    """

    task: AbstractTask
    batch: Batch
    autocast: Callable[[], AbstractContextManager[Any]]


def as_typed(arguments: Sequence[str]) -> list[str]:
    """The overrides of a command line, checked and completed as `fastdeq train` does it.

    Raises: ValueError, TypeError, FileNotFoundError.
    """
    check_renamed(arguments)
    overrides = with_saved_overrides(with_merged_groups(arguments))
    check_choices(overrides)
    return overrides


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a run. Raises: HydraException or OmegaConf's errors."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return cfg


def build_parts(overrides: Sequence[str]) -> Parts:
    """Build and check everything as a run does; no run folder is made. The weights are those of
    `checkpoint`, or else the last ones of `from_run`, or else new.

    Raises: as `fastdeq.experiment.run_config` does before anything is written.
    """
    cfg = composed(overrides)
    config = check(cfg).config
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    task = build_task(OmegaConf.create(config))
    weights = config["checkpoint"]
    if weights is None and config["from_run"] is not None:
        weights = Path(config["from_run"]) / LAST
    if weights is not None:
        load_weights(task, Path(weights))
    alone = {**config["trainer"], "devices": 1, "strategy": "auto"}
    trainer = make_trainer({**config, "trainer": alone}, task)
    precision, device = trainer.precision_plugin, trainer.strategy.root_device
    task = precision.convert_module(task).to(device)  # type: ignore[assignment]
    data = build_data(OmegaConf.create(config))
    data.prepare_data()
    data.setup("fit")
    first = next(iter(data.train_dataloader()))
    x, targets, weight = data.on_after_batch_transfer(first, 0)
    batch = (x.to(device), targets.to(device), weight)
    return Parts(task=task.train(), batch=batch, autocast=precision.train_step_context)


_ADJOINTS = ("implicit", "implicit_fixed_point", "shine", "neumann", "phantom", "jfb")
_EVERY_SOLVER = {field.name for field in fields(AbstractSolver)}


def build_choices(overrides: Sequence[str]) -> Choices:
    """Every solver of conf/solver and the common adjoints, as these overrides set them. Overrides
    of keys that only the chosen file has are left out for the others.

    Raises: HydraException for what is chosen.
    """
    cfg = composed(overrides)
    chosen = HydraConfig.get().runtime.choices
    names = {
        "solver": _first(
            chosen["solver"], sorted(p.stem for p in (CONF / "solver").glob("*.yaml"))
        ),
        "adjoint": _first(chosen["adjoint"], _ADJOINTS),
    }
    found: dict[str, dict[str, Any]] = {group: {} for group in names}
    refused = {}
    for group, choices in names.items():
        kept = {"solver": _EVERY_SOLVER, "adjoint": set()}[group]
        for place, name in enumerate(choices):
            words = overrides if place == 0 else _without_own(overrides, group, kept)
            try:
                found[group][name] = instantiate(
                    composed([*words, f"{group}={name}"])[group], _convert_="all"
                )
            except HydraException as error:  # it does not have a key that an experiment sets
                if place == 0:
                    raise
                refused[f"{group}={name}"] = str(error.__cause__ or error)
    return Choices(found["solver"], found["adjoint"], cfg.precision, refused)


def _first(chosen: str, names: Sequence[str]) -> list[str]:
    return [chosen, *(name for name in names if name != chosen)]


def _without_own(words: Sequence[str], group: str, kept: set[str]) -> list[str]:
    """Without the choice of the group, and without overrides of its keys that are not `kept`."""
    own = [word for word in words if word.lstrip("+~").startswith((f"{group}=", f"{group}."))]
    keys = [word.lstrip("+~").partition("=")[0].partition(".")[2] for word in own]
    dropped = [word for word, key in zip(own, keys, strict=True) if key not in kept]
    return [word for word in words if word not in dropped]
