"""Checkpoint files that are complete or absent, verified by a SHA-256."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from fastdeq.runs.files import remove_sealed, sealed_path


class SealedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, flushes it to the disk, renames it, and writes its
    SHA-256 to <name>.sha256. If the process or the machine dies in between, the old file or the
    new one is left.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Raises: OSError if the disk is full or not writable; an existing file is kept."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Given a path, torch's own writer also prints to stderr when the disk is full.
            with sealed_path(target) as aside, aside.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk by a RuntimeError
            raise OSError(
                f"no checkpoint can be written to {target} ({str(error).splitlines()[0]}): free "
                "some space, or choose another place (paths.outputs); the one before it is intact"
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load tensors and plain containers only: a checkpoint cannot run code."""
        return super().load_checkpoint(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove the file and its seal."""
        remove_sealed(Path(path))
