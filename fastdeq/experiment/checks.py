"""Checks of a configuration before anything is built or written."""

from dataclasses import fields
from itertools import product
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from fastdeq.data.module import AbstractDataModule
from fastdeq.experiment.arguments import check_node, named, unknown
from fastdeq.experiment.build import TASK, link
from fastdeq.experiment.keys import KEYS, RunSettings
from fastdeq.experiment.rendezvous import current_step
from fastdeq.experiment.signatures import signature_of
from fastdeq.training import PlainDataModule


def check_values(cfg: DictConfig) -> RunSettings:
    """Check names, types and ranges of a whole configuration; return its single values.

    Raises: TypeError or ValueError, with the key that defines the value, and the cure.
    """
    own = [field.name for field in fields(RunSettings)]
    for key in map(str, cfg):
        if key not in own and key not in KEYS:
            raise TypeError(unknown(key, (*own, *KEYS)))
    _check_task(cfg)
    cfg = link(cfg)
    values = {key: check_node(_node(cfg, key), key, Any) for key in own}
    try:
        run = RunSettings(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(named(str(error), {key: key for key in own}, "")) from error
    for key, hint in KEYS.items():
        check_node(_node(cfg, key), key, hint)
    _check_methods(cfg)
    _check_length(cfg.trainer)
    return run


def _check_task(cfg: DictConfig) -> None:
    """Raises: TypeError or ValueError for a task without a class, and with a part of its own."""
    task = cfg.get("task")
    if not isinstance(task, DictConfig | None):
        raise TypeError(
            f"task is {task}, but must be a mapping: set its keys, such as task._target_"
        )
    for name, key in TASK.items():
        if task and name in task:
            raise ValueError(f"task.{name} is built from {key}: set {key} instead")
    if not OmegaConf.select(cfg, "task._target_"):
        raise ValueError(
            "task has no class: set task._target_, such as fastdeq.training.ClassificationTask"
        )


def _node(cfg: DictConfig, key: str) -> Any:
    return cfg._get_node(key) if key in cfg else None


def _check_methods(cfg: DictConfig) -> None:
    """Raises: ValueError for a layer whose solver or adjoint is not the chosen and recorded one."""
    layers = [(name, node) for name, node in cfg.model.items() if isinstance(node, DictConfig)]
    for (name, layer), method in product(layers, ("solver", "adjoint")):
        taken = signature_of(get_object(layer._target_)).names if "_target_" in layer else ()
        if method in taken and layer.get(method) != cfg[method]:
            raise ValueError(
                f"model.{name}.{method} is {layer.get(method)}, but must be {method!r}: set "
                f"{method} instead"
            )


def _check_length(trainer: DictConfig) -> None:
    """Raises: ValueError for a run that does not train, end, or get tested."""
    lengths = {key: trainer.get(key) for key in ("max_epochs", "max_steps")}
    for key, length in lengths.items():
        if length is not None and length < 1 and length != -1:
            raise ValueError(
                f"trainer.{key} is {length}, but must be at least 1, or -1 for no limit (mode=test "
                "evaluates without training)"
            )
    if not any(length is not None and length > 0 for length in lengths.values()):
        raise ValueError(
            "trainer.max_epochs and trainer.max_steps both set no limit: the run would never end"
        )


def check_division(data: AbstractDataModule | PlainDataModule, ranks: int) -> None:
    """Raises: ValueError for batches that cannot be divided among the devices."""
    if isinstance(data, PlainDataModule):
        if ranks > 1:
            raise ValueError(
                f"data is {type(data.data).__name__}, whose batches are not divided among {ranks} "
                "devices: use trainer.devices=1, or derive it from fastdeq.data.InMemoryDataModule"
            )
    elif data.batch_size < ranks:
        raise ValueError(
            f"data.batch_size is {data.batch_size}, the batch of all devices together, but there "
            f"are {ranks} of them: use at least one sample per device"
        )


def check_sizes(sizes: DictConfig, shape: tuple[int, ...], outputs: int | None) -> None:
    """outputs: of the data; None: not known.

    Raises: ValueError for `sizes` that are not those of the data.
    """
    wanted = tuple(sizes.input), sizes.outputs
    if wanted != (shape, sizes.outputs if outputs is None else outputs):
        also = "" if outputs is None else f" and {outputs} outputs"
        raise ValueError(
            f"sizes.input is {wanted[0]} and sizes.outputs is {wanted[1]}, but the data has inputs "
            f"{shape}{also}: leave sizes to the data group (data=...)"
        )


def count_ranks(trainer: dict[str, Any], *, for_submission: bool = False) -> int:
    """The number of processes that train: one per device of a distributed strategy, else one.

    for_submission: the run is for other machines, which may have other devices.

    Raises: ValueError for more GPUs than there are, for several devices without a strategy that
    divides the work, and for other numbers of tasks than a cluster has started.
    """
    count = _count_devices(trainer, for_submission=for_submission)
    nodes: int = trainer.get("num_nodes", 1)
    step = None if for_submission else current_step()
    if step is not None and (step.ranks, step.nodes) != (count * nodes, nodes):
        raise ValueError(
            f"srun has started {step.ranks} tasks on {step.nodes} nodes, but trainer.devices is "
            f"{trainer.get('devices', 1)} and trainer.num_nodes is {nodes}: a run needs one task "
            "for each device of each node"
        )
    if nodes > 1 and step is None and not for_submission:
        raise ValueError(
            f"trainer.num_nodes is {nodes}: on several machines Slurm starts one task for each "
            "device (slurm/one_run.sbatch)"
        )
    return count * nodes


def _count_devices(trainer: dict[str, Any], *, for_submission: bool) -> int:
    """The number of devices of one node."""
    accelerator, devices = trainer.get("accelerator", "auto"), trainer.get("devices", 1)
    gpus = torch.cuda.device_count()
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and gpus > 0)
    if accelerator in ("gpu", "cuda") and not gpus and not for_submission:
        raise ValueError(
            f"trainer.accelerator is {accelerator}, but there is no GPU here: use "
            "trainer.accelerator=cpu, or trainer=ddp_cpu for several processes"
        )
    count = len(devices) if isinstance(devices, list) else devices
    if count in ("auto", -1, "-1"):
        if for_submission and accelerator != "cpu":
            raise ValueError(
                f"trainer.devices is {devices}, which is not known before the job starts: give "
                "the number of GPUs of a node"
            )
        count = max(gpus, 1) if on_gpu else 1
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"trainer.devices is {devices!r}, but must be at least 1, a list, or auto")
    wanted = max(devices) + 1 if isinstance(devices, list) and devices else count
    if on_gpu and wanted > gpus and not for_submission:
        raise ValueError(f"trainer.devices asks for {devices}, but there are {gpus} GPUs here")
    if count > 1 and not isinstance(trainer.get("strategy"), dict):
        cure = "trainer=ddp" if on_gpu else "trainer=ddp_cpu"
        raise ValueError(f"trainer.devices is {devices}: several devices need {cure}")
    return count
