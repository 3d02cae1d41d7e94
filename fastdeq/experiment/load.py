"""Trained models back from their run folders."""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastdeq.experiment.build import build_task
from fastdeq.experiment.checkpoint import load_weights
from fastdeq.experiment.explain import explain
from fastdeq.extras import MissingExtra
from fastdeq.nn import DEQChain
from fastdeq.runs.folder import BEST, CONFIG, LAST, WEIGHTS
from fastdeq.runs.identity import current, current_target
from fastdeq.runs.reading import read_config
from fastdeq.training import AbstractTask

try:
    from safetensors.torch import load_model
except ModuleNotFoundError:  # of the extra `safetensors`
    load_model = None  # type: ignore[assignment]


class Loaded(NamedTuple):
    """A model in evaluation mode, on the CPU, and the resolved configuration of its run."""

    model: DEQChain
    config: DictConfig


def load(run: str | os.PathLike[str], *, weights: Literal["last", "best"] = "last") -> Loaded:
    """The model of a run, and its configuration.

    run: a run folder, of this or another machine; one of its checkpoints; or a folder of
        `fastdeq export-weights`. Data and other folders of the run are not needed.
    weights: of the last epoch, which the metrics in summary.json belong to, or of the best
        validation. A checkpoint and an exported folder have only one.

    Raises: FileNotFoundError if a file is missing; ValueError for a file that is damaged or of
        another model.
    """
    path = Path(run)
    if weights not in ("last", "best"):
        raise ValueError(f"weights is {weights!r}, but must be 'last' or 'best'")
    config = _config_of(path.parent / CONFIG if path.is_file() else path / CONFIG)
    source = path if path.is_file() else _weights_in(path, weights)
    return Loaded(_with_weights(config, source).model.eval(), config)


def load_task(
    checkpoint: str | os.PathLike[str], config: str | os.PathLike[str] | None = None
) -> AbstractTask:
    """The task of a run with the weights of a checkpoint, in evaluation mode.

    config: its config.yaml; None: the one beside the checkpoint.

    Raises: as `load` does.
    """
    path = Path(checkpoint)
    given = path.parent / CONFIG if config is None else Path(config)
    return _with_weights(_config_of(given), path).eval()


def load_with(folder: Path, checkpoint: Path) -> DEQChain:
    """The model that a run folder describes, with weights from elsewhere, in evaluation mode."""
    return _with_weights(_config_of(folder / CONFIG), checkpoint).model.eval()


def _config_of(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} is not a run folder ({path.name} is missing): give the folder that a "
            "run has printed"
        )
    config: DictConfig = OmegaConf.create(
        _current_targets(current(read_config(path.parent, path.name)))
    )
    return config


def _current_targets(node: Any) -> Any:
    """The configuration with classes of earlier versions by their names of today."""
    if isinstance(node, dict):
        return {
            key: current_target(value)
            if key == "_target_" and isinstance(value, str)
            else _current_targets(value)
            for key, value in node.items()
        }
    return [_current_targets(each) for each in node] if isinstance(node, list) else node


def _weights_in(folder: Path, weights: str) -> Path:
    chosen = folder / {"last": LAST, "best": BEST}[weights]
    if chosen.is_file():
        return chosen
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    other = folder / {"last": BEST, "best": LAST}[weights]
    if other.is_file():
        raise FileNotFoundError(f"{chosen} does not exist, but {other.name} does: load that")
    raise FileNotFoundError(
        f"{folder} has no weights ({chosen.name} is missing): the run has not finished an epoch, "
        "or was a test of another run's weights"
    )


def _with_weights(config: DictConfig, path: Path) -> AbstractTask:
    """Raises: ValueError if the configuration does not build, or the weights do not fit it."""
    try:
        task = build_task(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"the model of {path.parent} cannot be built: {explain(error)}") from error
    if path.suffix != ".safetensors":
        load_weights(task, path)
        return task
    if load_model is None:
        raise MissingExtra(str(path), "safetensors")
    try:
        load_model(task.model, path)
    except Exception as error:  # SafetensorError is an Exception; RuntimeError: another model
        line = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged or holds another model ({line})") from error
    return task
