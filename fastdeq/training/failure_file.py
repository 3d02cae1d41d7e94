"""failure.ckpt: a failed training step with everything that a replay needs."""

from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from fastdeq.runs.folder import FAILURE
from fastdeq.training.checkpoint_io import SealedCheckpointIO
from fastdeq.training.diagnosis import Diagnosis
from fastdeq.training.random_state import as_plain, gathered
from fastdeq.training.step import BatchResult, StepResult


def save_failure(
    step: StepResult, diagnosis: Diagnosis, trainer: Trainer, module: LightningModule
) -> None:
    """Write failure.ckpt with each process's parts of the batches. All processes must call it."""
    first, *others = [_saved(each) for each in step.batches]
    device = module.device.index if module.device.type == "cuda" else None
    ranks = gathered(_on_host({**first, "device": device, "accumulated": others}), trainer)
    if not trainer.is_global_zero:
        return
    weights = module.state_dict()
    weights |= {name: tensor for name, tensor in step.before.items() if name in weights}
    content = {
        "state_dict": weights,
        "failure": {
            "step": step.number,
            "epoch": step.epoch,
            "depth": step.depth,
            "accumulates": step.accumulates,
            "diagnosis": vars(diagnosis),
            "ranks": ranks,
        },
    }
    SealedCheckpointIO().save_checkpoint(content, Path(trainer.default_root_dir) / FAILURE)


def _saved(each: BatchResult) -> dict[str, Any]:
    random = None if each.random is None else as_plain(each.random)
    return {"batch": list(each.batch), "random": random, **each.states}


def _on_host(node: Any) -> Any:
    if isinstance(node, Tensor):
        return node.cpu()
    if isinstance(node, dict):
        return {name: _on_host(value) for name, value in node.items()}
    return type(node)(map(_on_host, node)) if isinstance(node, list | tuple) else node
