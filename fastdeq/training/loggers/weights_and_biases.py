"""The optional Weights & Biases logger (conf/logger/wandb.yaml); needs the extra `wandb`.

The package does not import this module itself, so wandb need not be installed.
"""

import os
import secrets
from pathlib import Path
from typing import Literal, cast

from pytorch_lightning.loggers import WandbLogger

from fastdeq.extras import extra_for
from fastdeq.report.drawing import drawn
from fastdeq.report.records import Record
from fastdeq.runs.files import write_text
from fastdeq.runs.folder import WANDB_ID

with extra_for("logger=wandb"):
    import wandb

Mode = Literal["auto", "online", "offline", "disabled"]


class WeightsAndBiases(WandbLogger):
    """One W&B run per experiment, in its run folder. Call `close` at the end, also after an error.
    An interrupted experiment that resumes keeps its W&B run.

    mode: auto is online if credentials are known (WANDB_API_KEY, netrc), else offline. The
        environment variable WANDB_MODE takes precedence. There is no prompt, and offline mode needs
        no network (upload later: wandb sync <folder>/wandb/offline-run-*).
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
            # train.log has the console output; capturing it disturbs the progress bar.
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        super().__init__(experiment=self._run, save_dir=str(save_dir), log_model=False)

    def log_plots(self, run: Record, step: int) -> None:
        """Show plots of the run, if matplotlib is installed."""
        images = {f"plots/{name}": wandb.Image(pixels) for name, pixels in drawn(run).items()}
        if images:
            self.log_metrics(cast(dict[str, float], images), step)

    def close(self) -> None:
        """Finish the run: write the rest, so that the next job gets a run of its own."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    """The run's W&B id, kept in its folder: a resumed run also resumes at W&B."""
    path = folder / WANDB_ID
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8")


def _mode(mode: Mode) -> Literal["online", "offline", "disabled"]:
    chosen = os.environ.get("WANDB_MODE")
    if chosen is not None:
        mode = cast(Mode, chosen)  # W&B itself refuses unknown modes
    if mode != "auto":
        return mode
    return "online" if wandb.login(prompt=False, verify=False) else "offline"
