"""The top-level keys of a configuration (conf/train.yaml), and their types.

Everything below a `_target_` is declared by the class or function that it names.
"""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, Literal

from pytorch_lightning import Callback, LightningDataModule, Trainer
from pytorch_lightning.loggers import Logger

from fastdeq.adjoints import AbstractAdjoint
from fastdeq.autocast import Precision
from fastdeq.experiment.arguments import Record
from fastdeq.settings import setting, settings
from fastdeq.solvers import AbstractSolver
from fastdeq.training import AbstractTask


@settings
class RunSettings:
    """The top-level keys with single values; see conf/train.yaml."""

    name: str = setting()
    seed: int = setting(at_least=0, at_most=2**32 - 1)  # of NumPy's generator
    mode: Literal["train", "test", "replay", "curve"] = setting()
    checkpoint: str | None = setting()
    from_run: str | None = setting()
    extend: str | None = setting()
    resume: Literal["auto", "never"] = setting()
    stop_after: float | None = setting(above=0)
    stop_at_failure: bool = setting()
    nfe: list[int] | None = setting()
    progress_minutes: float | None = setting(above=0)
    debug: bool = setting()
    precision: Precision | None = setting()
    compile: bool = setting()
    memory_format: Literal["contiguous", "channels_last"] = setting()

    def validate(self) -> None:
        path = PurePosixPath(self.name)
        if path.is_absolute() or ".." in path.parts or not self.name:
            raise ValueError(f"name is {self.name!r}, but must be a folder below paths.outputs")
        if self.extend is not None and (
            self.mode != "train" or self.checkpoint is not None or self.from_run is not None
        ):
            raise ValueError(
                f"extend is {self.extend}, which says everything about the start: leave mode, "
                "checkpoint and from_run out"
            )
        if self.mode == "test" and self.checkpoint is None and self.from_run is None:
            raise ValueError(
                "mode=test needs weights: give checkpoint=PATH, or from_run=FOLDER for the last "
                "ones of a run"
            )
        if self.mode == "curve" and self.checkpoint is None and self.from_run is None:
            raise ValueError(
                "mode=curve needs weights: give checkpoint=PATH, or from_run=FOLDER for the last "
                "ones of a run"
            )
        if self.nfe is not None and (not self.nfe or min(self.nfe) < 0):
            raise ValueError(f"nfe is {self.nfe}, but must list numbers of at least 0")
        if self.mode == "replay" and self.checkpoint is None and self.from_run is None:
            raise ValueError(
                "mode=replay needs a failed step: give from_run=FOLDER for the one that a run has "
                "kept (failure.ckpt), or checkpoint=PATH"
            )


@settings
class Paths(Record):
    """Where runs are written; see conf/train.yaml."""

    outputs: str = setting()
    run: str | None = setting()


@settings
class Sizes(Record):
    """The sizes that a model must fit; the group `data` sets them.

    classes: the outputs of each variant of a set, which its file chooses from.
    """

    input: list[int] = setting()
    features: int = setting(at_least=1)
    outputs: int = setting(at_least=1)
    classes: dict[str, int] | None = None


KEYS: dict[str, Any] = {
    "paths": Paths,
    **{"data": LightningDataModule, "sizes": Sizes, "arch": dict[str, Any] | None},
    **{"solver": AbstractSolver, "adjoint": AbstractAdjoint},
    # Any: these are arguments of the task, whose annotations are checked.
    **dict.fromkeys(("loss", "optimizer", "scheduler", "model"), Any),
    **{"trainer": Trainer, "callbacks": dict[str, Callback] | None},
    **{"logger": dict[str, Callable[..., Logger]] | None, "task": AbstractTask},
}
"""The annotations of all other top-level keys, parts before the objects that contain them."""
