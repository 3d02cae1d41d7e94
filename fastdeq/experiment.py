"""L8: from a configuration to a trained model and a run folder; only this module knows Hydra."""

import json
import logging
import platform
import shlex
import subprocess
import sys
import time
import warnings
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger

import fastdeq
from fastdeq.callbacks import EpochLines, StepTimer


def run(cfg: DictConfig) -> float:
    """Seed, build, fit, test and record one experiment; returns the test accuracy in [0, 1].

    The run folder, <paths.outputs>/<name>/<date and time>, holds the resolved configuration
    (config.yaml), the figures of every epoch (metrics.csv), the last checkpoint (checkpoint.ckpt)
    and summary.json: the final figures and what they were made with.

    Raises: ValueError where the configured sizes are not the data's, before anything is written;
    and what the parts raise for settings out of range.
    """
    _quiet()
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data)
    _check_sizes(cfg, data)
    task = instantiate(cfg.task, _convert_="all")
    folder = _make_folder(Path(cfg.paths.outputs) / cfg.name)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    timer = StepTimer()
    trainer = _make_trainer(cfg, folder, timer)
    _announce(task, trainer, folder)
    begin = time.perf_counter()
    trainer.fit(task, datamodule=data)
    seconds = time.perf_counter() - begin
    (figures,) = trainer.test(task, datamodule=data, verbose=False)
    summary = {
        "figures": figures,
        "train_seconds": round(seconds, 3),
        "train_ms_per_step": timer.median_ms,
        "steps": trainer.global_step,
        "parameters": _count_parameters(task),
        "seed": cfg.seed,
        **_provenance(task.device),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _conclude(summary, folder)
    return float(figures["test/accuracy"])


def _quiet() -> None:
    """Keep Lightning's advice that does not apply here off the screen; real warnings stay."""
    # Its banner (hardware found, loggers on offer) is replaced by the lines of _announce.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        "Experiment logs directory",  # the folder is new, and config.yaml is in it first
        "Checkpoint directory",  # likewise
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning 2.6 on torch 2.13
        ".*does not have many workers",  # batches are cut from memory
    ):
        warnings.filterwarnings("ignore", message=message)


def _check_sizes(cfg: DictConfig, data: Any) -> None:
    wanted = (tuple(cfg.sizes.input), cfg.sizes.classes)
    found = (tuple(data.input_shape), data.classes)
    if wanted != found:
        raise ValueError(
            f"sizes say images {wanted[0]} of {wanted[1]} classes, but the data has {found[0]} of "
            f"{found[1]}: leave sizes to the data group (data=...)"
        )


def _make_folder(parent: Path) -> Path:
    """A new folder, named after the time; a number is added where another run was as quick."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1000):
        folder = parent / (stamp if attempt == 0 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"could not make a new folder in {parent}: 1000 runs in one second")


def _make_trainer(cfg: DictConfig, folder: Path, timer: StepTimer) -> lightning.Trainer:
    # Nothing is selected on the evaluated set: the last state is the one that is kept and tested.
    checkpoint = ModelCheckpoint(
        dirpath=folder, filename="checkpoint", enable_version_counter=False
    )
    # Lines for logs and pipes; on a terminal a bar beside them, gone when the epoch is.
    bar = [TQDMProgressBar(leave=False)] if sys.stderr.isatty() else []
    trainer: lightning.Trainer = instantiate(
        cfg.trainer,
        _convert_="all",
        logger=CSVLogger(save_dir=folder, name="", version=""),
        callbacks=[EpochLines(), timer, checkpoint, *bar],
        default_root_dir=folder,
        enable_progress_bar=bool(bar),
    )
    return trainer


def _announce(task: Any, trainer: lightning.Trainer, folder: Path) -> None:
    layer = task.model.equilibrium
    print(f"run folder  {folder}")
    print(f"device      {trainer.strategy.root_device}")
    print(f"parameters  {_count_parameters(task):,}")
    print(f"solver      {layer.solver}")
    print(f"adjoint     {layer.adjoint}")
    print(f"loss        {task.weights}", flush=True)


def _conclude(summary: dict[str, Any], folder: Path) -> None:
    figures, step = summary["figures"], summary["train_ms_per_step"]
    print(
        f"test accuracy {100 * figures['test/accuracy']:.2f} %, NFE {figures['test/nfe']:.2f}, "
        f"relative residual {figures['test/residual']:.1e}"
    )
    if "test/explicit_accuracy" in figures:
        print(f"without a solve {100 * figures['test/explicit_accuracy']:.2f} %")
    pace = "" if step is None else f", {step:.1f} ms a step"
    print(f"{summary['steps']} steps in {summary['train_seconds']:.1f} s{pace}; see {folder}")


def _count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _provenance(device: torch.device) -> dict[str, Any]:
    """Where the figures come from: versions, commit, device and command."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "fastdeq": fastdeq.__version__,
            "torch": torch.__version__,
            "pytorch_lightning": version("pytorch-lightning"),
            "python": platform.python_version(),
        },
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(sys.argv),
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the package's own checkout; None outside one or without git."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(fastdeq.__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
