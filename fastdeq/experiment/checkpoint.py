"""Loading weights from a checkpoint of another run."""

import pickle
from pathlib import Path
from typing import Any

import torch

from fastdeq.training import AbstractTask


def load_weights(task: AbstractTask, path: Path) -> None:
    """Load the weights of a Lightning checkpoint into `task`, and nothing else.

    Raises: FileNotFoundError if there is none; ValueError for a file that is damaged, is not a
        checkpoint, or is of another model.
    """
    weights = read_checkpoint(path).get("state_dict")
    if not isinstance(weights, dict):
        raise ValueError(f"{path} is not a checkpoint of a run: give best.ckpt or last.ckpt of one")
    try:
        task.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]
        raise ValueError(
            f"{path} holds another model than this configuration ({''.join(first).strip()}): "
            "start from its run (from_run=FOLDER), or choose its model and arch"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of the file; empty if it is not a dictionary.

    Raises: FileNotFoundError if there is none; ValueError for a file that cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} is not a file: give last.ckpt of a run folder")
    try:
        # Tensors and plain containers only: a checkpoint can run no code.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"checkpoint: {path} cannot be read: it is truncated, damaged or not a checkpoint; "
            "take another one of its run"
        ) from error
    return content if isinstance(content, dict) else {}
