"""Checks before a job is submitted, so that it does not fail after hours in the queue."""

import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

_EARLY = 60  # seconds: Slurm may send its signal by that much too early


def to_submit(launcher: DictConfig) -> dict[str, Any] | None:
    """The settings of conf/hydra/launcher/submitit_slurm.yaml, plain; None for another launcher."""
    if not str(launcher.get("_target_")).endswith(".SlurmLauncher"):
        return None
    plain: dict[str, Any] = OmegaConf.to_container(launcher, resolve=True)  # type: ignore[assignment]
    return plain


def check_tasks(launcher: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Raises: ValueError if Slurm would not start one task per device."""
    devices, nodes = trainer["devices"], trainer["num_nodes"]
    count = len(devices) if isinstance(devices, list) else devices
    for name, value, key, wanted in (
        ("tasks_per_node", launcher["tasks_per_node"], "devices", count),
        ("nodes", launcher["nodes"], "num_nodes", nodes),
    ):
        if value != wanted:
            raise ValueError(
                f"hydra.launcher.{name} is {value}, but trainer.{key} is {trainer[key]}: a run "
                "needs one task for each device of each node"
            )
    gpus = launcher["gpus_per_node"]
    if trainer["accelerator"] in ("gpu", "cuda") and gpus is not None and gpus < count:
        raise ValueError(
            f"hydra.launcher.gpus_per_node is {gpus}, but trainer.devices is {count}: ask for as "
            "many GPUs"
        )


def check_queue(launcher: Mapping[str, Any]) -> None:
    """Raises: ValueError for a time that is missing or too short, or an unknown partition; OSError
    if the commands of Slurm fail.
    """
    limit, delay = launcher["timeout_min"], launcher["signal_delay_s"]
    if limit < 1:
        raise ValueError(
            "hydra.launcher.timeout_min is not given: say how many minutes a job may take before "
            "it saves its state and is requeued"
        )
    if 60 * limit < delay + _EARLY:
        raise ValueError(
            f"hydra.launcher.timeout_min is {limit}, but the run is signalled to stop "
            f"signal_delay_s={delay} seconds before its end, or up to {_EARLY} seconds earlier: "
            "give the job more time, or a shorter delay"
        )
    partitions = _ask("sinfo", "-h", "-o", "%R").split()
    if (wanted := launcher["partition"]) is not None:
        for name in str(wanted).split(","):
            if name not in partitions:
                raise ValueError(
                    f"hydra.launcher.partition is {name}, but there are "
                    f"{', '.join(sorted(set(partitions)))} (sinfo)"
                )
    try:
        _ask("sacct", "-n", "-X", "-o", "JobID,State")
    except OSError as error:
        # Without it submitit would wait forever for a job that was killed.
        raise OSError(f"the states of jobs cannot be asked for: {error}") from error


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(
            f"{command[0]} is not on PATH: start this where Slurm's commands are, on a login node"
        )
    answer = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if answer.returncode != 0:
        reason = " ".join(answer.stderr.split()) or f"status {answer.returncode}"
        raise OSError(f"{command[0]} fails: {reason}")
    return answer.stdout
