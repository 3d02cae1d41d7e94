"""Weights & Biases by choice (conf/logger/wandb.yaml); needs the extra `wandb`.

Not imported by the package itself: who does not choose it need not have it.
"""

import os
import secrets
from pathlib import Path
from typing import Literal, cast

import wandb
from pytorch_lightning.loggers import WandbLogger

from fastdeq.runs.files import write_text
from fastdeq.runs.folder import WANDB_ID

Mode = Literal["auto", "online", "offline", "disabled"]


class WeightsAndBiases(WandbLogger):
    """One W&B run for one experiment, in its run folder; call `close` in the end, whatever came.
    An experiment that is interrupted and goes on keeps its W&B run.

    mode: auto is online where credentials are known (WANDB_API_KEY, netrc) and offline elsewhere;
    the environment's WANDB_MODE comes first. Nothing is asked, and no network is needed offline
    (send it later: wandb sync <folder>/wandb/offline-run-*).
    """

    def __init__(
        self,
        *,
        save_dir: Path,
        project: str,
        name: str | None = None,
        group: str | None = None,
        mode: Mode = "auto",
    ) -> None:
        self._run = wandb.init(
            project=project,
            id=_run_id(Path(save_dir)),
            resume="allow",
            name=name,
            group=group,
            dir=save_dir,
            mode=_mode(mode),
            reinit="create_new",  # a sweep's jobs follow each other in one process
            # train.log has the console, and taking it over disturbs the progress bar.
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        super().__init__(experiment=self._run, save_dir=str(save_dir), log_model=False)

    def close(self) -> None:
        """Finish the run: what is left is written, and the next job gets one of its own."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    """The run's id at W&B, kept in its folder: a run that goes on goes on there too."""
    path = folder / WANDB_ID
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8")


def _mode(mode: Mode) -> Literal["online", "offline", "disabled"]:
    chosen = os.environ.get("WANDB_MODE")
    if chosen is not None:
        mode = cast(Mode, chosen)  # what W&B does not know, it refuses itself
    if mode != "auto":
        return mode
    return "online" if wandb.login(prompt=False, verify=False) else "offline"
