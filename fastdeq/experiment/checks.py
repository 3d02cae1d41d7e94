"""L8: what is refused before anything is built or written."""

import difflib
import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, get_type_hints

import torch
from hydra.utils import get_object

from fastdeq.experiment.cluster import current_step
from fastdeq.settings import describe, fits, setting, settings

GROUPS = (
    *("data", "sizes", "solver", "adjoint", "loss", "optimizer", "scheduler", "trainer"),
    *("callbacks", "logger", "paths", "reference", "skip_weight", "arch", "model", "task"),
)
"""The nodes of a configuration beside the fields of `RunSettings`, parts before what they are parts
of: what is wrong is reported under the key that was typed, and not where interpolation takes it.
"""


@settings
class RunSettings:
    """The single values at the top of a configuration; see conf/train.yaml."""

    name: str = setting()
    seed: int = setting(at_least=0, at_most=2**32 - 1)  # what NumPy takes
    mode: Literal["train", "test", "replay"] = setting()
    checkpoint: str | None = setting()
    from_run: str | None = setting()
    resume: Literal["auto", "never"] = setting()
    stop_after: float | None = setting(above=0)
    stop_at_failure: bool = setting()
    debug: bool = setting()

    def check_together(self) -> None:
        path = PurePosixPath(self.name)
        if path.is_absolute() or ".." in path.parts or not self.name:
            raise ValueError(f"name is {self.name!r}, but must be a folder below paths.outputs")
        if self.mode == "test" and self.checkpoint is None and self.from_run is None:
            raise ValueError(
                "mode=test needs weights: give checkpoint=PATH, or from_run=FOLDER for the last "
                "ones of a run"
            )
        if self.mode == "replay" and self.checkpoint is None and self.from_run is None:
            raise ValueError(
                "mode=replay needs a failed step: give from_run=FOLDER for the one that a run has "
                "kept (failure.ckpt), or checkpoint=PATH"
            )


def check_values(config: dict[str, Any]) -> RunSettings:
    """Check names, types and ranges throughout a resolved configuration; its single values.

    Raises: TypeError or ValueError, with the key and the cure.
    """
    own = [field.name for field in fields(RunSettings)]
    for key in config:
        if key not in own and key not in GROUPS:
            raise TypeError(_unknown(key, (*own, *GROUPS)))
    for key, value in _leaves(config, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}, but must be a finite number")
    run = _run_settings({name: config.get(name) for name in own})
    for key in GROUPS:
        _check_node(key, config.get(key))
    _check_length(config["trainer"])
    return run


def _run_settings(values: dict[str, Any]) -> RunSettings:
    try:
        return RunSettings(**values)
    except (TypeError, ValueError) as error:
        text = str(error).removeprefix(f"{RunSettings.__name__}.")  # these keys stand at the top
        raise type(error)(text) from error


def _check_length(trainer: dict[str, Any]) -> None:
    """A run must train, come to an end, and be tested."""
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
    clip = trainer.get("gradient_clip_val")
    if clip is not None and clip <= 0:
        raise ValueError(f"trainer.gradient_clip_val is {clip}, but must be above 0, or null")
    for key in ("check_val_every_n_epoch", "accumulate_grad_batches"):
        if (every := trainer.get(key)) is not None and every < 1:
            raise ValueError(f"trainer.{key} is {every}, but must be at least 1")
    for key in ("limit_train_batches", "limit_test_batches"):
        if trainer.get(key) == 0:
            raise ValueError(
                f"trainer.{key} is 0, but must be above 0: a share (1.0), or a number of batches"
            )


def count_ranks(trainer: dict[str, Any], *, elsewhere: bool = False) -> int:
    """How many processes train: one for each device of a distributed strategy, else one.

    elsewhere: the run is for other machines than this one, which may lack their devices.

    Raises: ValueError for more GPUs than there are, for several devices without a strategy that
    divides the work, and for other numbers of tasks than a cluster has started.
    """
    count = _count_devices(trainer, elsewhere=elsewhere)
    nodes: int = trainer.get("num_nodes", 1)
    step = None if elsewhere else current_step()
    if step is not None and (step.ranks, step.nodes) != (count * nodes, nodes):
        raise ValueError(
            f"srun has started {step.ranks} tasks on {step.nodes} nodes, but trainer.devices is "
            f"{trainer.get('devices', 1)} and trainer.num_nodes is {nodes}: a run needs one task "
            "for each device of each node"
        )
    if nodes > 1 and step is None and not elsewhere:
        raise ValueError(
            f"trainer.num_nodes is {nodes}: on several machines Slurm starts one task for each "
            "device (slurm/one_run.sbatch)"
        )
    return count * nodes


def _count_devices(trainer: dict[str, Any], *, elsewhere: bool) -> int:
    """Of one node."""
    accelerator, devices = trainer.get("accelerator", "auto"), trainer.get("devices", 1)
    gpus = torch.cuda.device_count()
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and gpus > 0)
    if accelerator in ("gpu", "cuda") and not gpus and not elsewhere:
        raise ValueError(
            f"trainer.accelerator is {accelerator}, but there is no GPU here: use "
            "trainer.accelerator=cpu, or trainer=ddp_cpu for several processes"
        )
    count = len(devices) if isinstance(devices, list) else devices
    if count in ("auto", -1, "-1"):
        if elsewhere and accelerator != "cpu":
            raise ValueError(
                f"trainer.devices is {devices}, which is not known before the job starts: give "
                "the number of GPUs of a node"
            )
        count = max(gpus, 1) if on_gpu else 1
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"trainer.devices is {devices!r}, but must be at least 1, a list, or auto")
    wanted = max(devices) + 1 if isinstance(devices, list) and devices else count
    if on_gpu and wanted > gpus and not elsewhere:
        raise ValueError(f"trainer.devices asks for {devices}, but there are {gpus} GPUs here")
    if count > 1 and not isinstance(trainer.get("strategy"), dict):
        cure = "trainer=ddp" if on_gpu else "trainer=ddp_cpu"
        raise ValueError(f"trainer.devices is {devices}: several devices need {cure}")
    return count


def nearest(name: str, known: Iterable[str]) -> str:
    """The question whether something known and close was meant, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(repr(each) for each in found)}?" if found else ""


def _unknown(key: str, known: Iterable[str]) -> str:
    return f"there is no key '{key}'{nearest(key, known)}"


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{key}[{index}]")
    else:
        yield key, node


def _check_node(key: str, node: Any) -> None:
    """Hold the keys of every `_target_` against the signature of what it names."""
    if isinstance(node, list):
        for index, value in enumerate(node):
            _check_node(f"{key}[{index}]", value)
    if not isinstance(node, dict):
        return
    for name, value in node.items():
        _check_node(f"{key}.{name}", value)
    if "_target_" in node:
        _check_arguments(key, node)


def _check_arguments(key: str, node: dict[str, Any]) -> None:
    target = get_object(node["_target_"])
    known, open_ended = _parameters(target)
    hints = _hints(
        target if is_dataclass(target) or not inspect.isclass(target) else target.__init__
    )
    for name, value in node.items():
        if name.startswith("_"):
            continue
        if name not in known and not open_ended:
            raise TypeError(_unknown(f"{key}.{name}", [f"{key}.{other}" for other in known]))
        if name in hints and not isinstance(value, dict) and not fits(value, hints[name]):
            raise TypeError(f"{key}.{name} is {value!r}, but must be {describe(hints[name])}")


def _parameters(target: Any) -> tuple[list[str], bool]:
    """Names of the arguments, and whether any others are taken."""
    if is_dataclass(target):
        return [field.name for field in fields(target) if field.init], False
    parameters = inspect.signature(target).parameters
    return list(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _hints(target: Any) -> dict[str, Any]:
    try:
        return get_type_hints(target)
    except (NameError, TypeError, AttributeError):  # of libraries that hide their types
        return {}
