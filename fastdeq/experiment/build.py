"""Builds the task from the groups of a configuration; each part is built once.

A file of the group `model` names parts by their keys: `cell: arch.cell`, `solver: solver`.
"""

import copy
import re
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, open_dict

from fastdeq.data.module import AbstractDataModule
from fastdeq.nn import DeepEquilibriumNetwork, DEQChain
from fastdeq.settings import check_value
from fastdeq.training import AbstractTask, LossWeights, PlainDataModule
from fastdeq.training.task import OptimizerFactory

TASK = {"model": "model", "optimizer": "optimizer", "weights": "loss", "schedule": "scheduler"}
"""Arguments of the task, and the keys that they are built from."""

STEP: dict[str, tuple[Any, dict[str, float]]] = {
    "accumulate_grad_batches": (int, {"at least": 1}),
    "gradient_clip_val": (float, {"at least": 0}),
    "gradient_clip_algorithm": (Literal["norm", "value"], {}),
}
"""Arguments of the task that are keys of the trainer, where users of Lightning look for them: the
type and the bounds of each.
"""

_PART = re.compile(r"solver|adjoint|arch(\.\w+)+")


def build_task(cfg: DictConfig, model: DEQChain | None = None) -> AbstractTask:
    """The task of a configuration, composed or resolved.

    model: the result of `build_model`; None builds it here.

    The skip loss compares z₀ with z*, so it is left out if the model does not predict z₀.
    """
    model = build_model(cfg) if model is None else model
    weights: LossWeights = instantiate(cfg.loss, _convert_="all")
    if weights.skip and not predicts(model):
        weights = replace(weights, skip=0.0)
    task: AbstractTask = instantiate(cfg.task, _convert_="all", _partial_=True)(
        model=model,
        optimizer=_fused(instantiate(cfg.optimizer, _convert_="all")),
        weights=weights,
        schedule=instantiate(cfg.scheduler, _convert_="all"),
        **step_settings(cfg.trainer),
    )
    return task


_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_IMPLEMENTATIONS = {"fused", "foreach", "differentiable"}


def _fused(make: OptimizerFactory) -> OptimizerFactory:
    """The same optimizer, all parameters in one kernel; unless the configuration chooses."""
    if not isinstance(make, partial) or make.func not in _FUSED:
        return make
    return make if make.keywords.keys() & _IMPLEMENTATIONS else partial(make, fused=True)


def step_settings(trainer: DictConfig) -> dict[str, Any]:
    """What the trainer's keys say about the training step.

    Raises: TypeError or ValueError that names the key.
    """
    given = {name: trainer[name] for name in STEP if trainer.get(name) is not None}
    for name, value in given.items():
        check_value(f"trainer.{name}", value, *STEP[name])
    return given


def build_data(cfg: DictConfig) -> AbstractDataModule | PlainDataModule:
    """The data module of a configuration, composed or resolved.

    Raises: ValueError for one that lacks a loader.
    """
    data = instantiate(cfg.data, _convert_="all")
    return data if isinstance(data, AbstractDataModule) else PlainDataModule(data, seed=cfg.seed)


def build_model(cfg: DictConfig) -> DEQChain:
    """The chain of layers, with the layers of `arch`, the solver and the adjoint that it names."""
    model: DEQChain = instantiate(link(cfg).model, _convert_="all")
    # Configurations of earlier versions have neither key.
    if cfg.get("precision") is not None:
        for layer in model.equilibria:
            layer.precision = cfg.precision
    if cfg.get("compile"):
        _compile(model)
    if cfg.get("memory_format") == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _compile(model: DEQChain) -> None:
    layers = [each for each in model.modules() if isinstance(each, DeepEquilibriumNetwork)]
    if not layers:
        raise ValueError(
            "compile=true compiles solves, but the model has none: leave compile out, or choose a "
            "model with an equilibrium"
        )
    for layer in layers:
        layer.compile_solves()


def predicts(model: DEQChain) -> bool:
    """Whether the model predicts z₀."""
    return model.predicts


def link(cfg: DictConfig) -> DictConfig:
    """A copy of the configuration in which names of parts are interpolations of their nodes, and
    the task has its arguments.
    """
    linked = copy.deepcopy(cfg)
    with open_dict(linked):
        _link(linked._get_node("model"))
        if isinstance(task := linked._get_node("task"), DictConfig) and not task._is_none():
            for name, key in TASK.items():
                task[name] = f"${{{key}}}"
    return linked


def _link(node: object) -> None:
    if not isinstance(node, DictConfig) or node._is_none() or node._is_interpolation():
        return
    for name in node:
        child: Any = node._get_node(name)
        _link(child)
        value = None if isinstance(child, DictConfig | ListConfig) else child._value()
        if isinstance(value, str) and _PART.fullmatch(value):
            node[name] = f"${{{value}}}"
