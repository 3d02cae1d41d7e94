"""The identity of a run: the settings that its results depend on.

Resuming a run and grouping runs in a report both use it.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

Leaf = str | int | float | bool | None

FREE = (
    *("paths", "logger", "from_run", "debug", "progress_minutes"),
    *("resume", "stop_after", "stop_at_failure", "callbacks.resumption", "callbacks.record"),
    "nfe",  # of mode=curve, which makes no run
    *("trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.num_nodes"),
    *("trainer.detect_anomaly", "trainer.log_every_n_steps", "trainer.enable_model_summary"),
    *("data.root", "data.store", "data.download", "data.verify", "data.workers"),
    *("memory_format", "compile"),
)
"""Keys, with all keys below them, that a run's results do not depend on, except by rounding:
folders, devices, when it stops, what it logs, and the order of numbers in memory.
"""

DEFAULTS = {
    "adjoint.order": 1,
    **{"data.extra": False, "data.skip_unreadable": False},
    **{"data.test_share": 0, "data.test_seed": 0},
}
"""Keys that configurations of earlier versions lack, with the values that they meant."""

COPIES = {"optimizer": "optimizer", "model": "model", "weights": "loss", "schedule": "scheduler"}
"""Arguments of the task that configurations of earlier versions repeat, and the repeated keys."""

RENAMED = {
    "fastdeq.tasks.": "fastdeq.training.",
    "fastdeq.callbacks.": "fastdeq.training.",
}
"""Prefixes of `_target_` in configurations of earlier versions, and their replacements."""

COUNTED = ("trainer.limit_", "trainer.overfit_batches", "trainer.val_check_interval")
"""Prefixes of keys for which 1 means one batch, and 1.0 all batches."""


def leaves(config: Mapping[str, Any]) -> dict[str, Leaf]:
    """Dotted key and value of every leaf; an empty container counts as a leaf."""
    return dict(_leaves(config, ""))


def identity(config: Mapping[str, Any]) -> dict[str, Leaf]:
    """The settings that a run's results depend on, by their dotted keys.

    A key without a value counts as missing, since older configurations lack newer keys. 1 and 1.0
    are the same, except where one is a count and the other a share.

    config: resolved, plain containers.
    """
    return identity_of(leaves(current(config)))


def identity_of(settings: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """As `identity`, of the leaves of a configuration in the form of this version."""
    return {
        key: _plain(key, value)
        for key, value in settings.items()
        if value not in _EMPTY and not _is_free(key) and DEFAULTS.get(key) != value
    }


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in the form of this version.

    Earlier versions repeat the parts of the model and of the task as whole nodes instead of keys
    (`model.deq.solver: solver`), have λ_skip in `skip_weight` and in `loss.skip`, and the published
    row in `reference`. An `ode_tol` of null, the default of earlier versions, is `tol`.
    """
    new = {key: value for key, value in config.items() if key != "reference"}
    solver = config.get("solver")
    if isinstance(solver, Mapping) and solver.get("ode_tol", 0) is None:
        new["solver"] = {**solver, "ode_tol": solver.get("tol")}
    if isinstance(task := config.get("task"), Mapping):
        new["task"] = {
            name: value
            for name, value in task.items()
            if name not in COPIES or value != config.get(COPIES[name])
        }
    if isinstance(model := config.get("model"), Mapping):
        parts = _parts(config)
        new["model"] = {name: _by_key(name, layer, parts) for name, layer in model.items()}
        weight, loss = new.pop("skip_weight", None), config.get("loss")
        if weight is not None and isinstance(loss, Mapping) and not _predicts(model):
            new["loss"] = {**loss, "skip": weight}  # earlier versions wrote 0 for these models
    return new


def _parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The possible parts of a model, by key."""
    arch = config.get("arch") or {}
    layers = {f"arch.{name}": node for name, node in arch.items() if isinstance(node, Mapping)}
    return {**layers, **{key: config[key] for key in ("solver", "adjoint") if key in config}}


def _by_key(name: str, node: Any, parts: Mapping[str, Any]) -> Any:
    """A node of the model with each part replaced by its key; of equal parts, that of its name."""
    if not isinstance(node, Mapping):
        return node
    for key in (f"arch.{name}", *parts):
        if key in parts and parts[key] == node:
            return key
    return {inner: _by_key(inner, part, parts) for inner, part in node.items()}


def _predicts(model: Mapping[str, Any]) -> bool:
    """Whether a model of an earlier version predicts z₀: one of the skip models."""
    layers = [layer for layer in model.values() if isinstance(layer, Mapping)]
    return any("Skip" in str(layer.get("_target_")) for layer in layers)


_EMPTY = (None, "[]", "{}")


def digest(settings: Mapping[str, Leaf]) -> str:
    """A hash of settings, twelve hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def without_seeds(settings: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """An identity without its seeds, over which a report takes means."""
    return {key: value for key, value in settings.items() if key.rpartition(".")[2] != "seed"}


def current_target(name: str) -> str:
    """The name of today of a class that a configuration of an earlier version names."""
    prefixes = [(old, new) for old, new in RENAMED.items() if name.startswith(old)]
    return next((new + name.removeprefix(old) for old, new in prefixes), name)


_FREE = frozenset(FREE)


def _is_free(key: str) -> bool:
    """Whether the key, or one that contains it, is in FREE."""
    ends = (found.start() for found in re.finditer(r"[.\[]|$", key))
    return any(key[:end] in _FREE for end in ends)


def _plain(key: str, value: Leaf) -> Leaf:
    if isinstance(value, str) and key.endswith("_target_"):
        return current_target(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if key.startswith(COUNTED):
        return f"{value} batches" if isinstance(value, int) else value
    return int(value) if math.isfinite(value) and value == int(value) else value


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Leaf]]:
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list) and node:
        for index, value in enumerate(node):
            yield from _leaves(value, f"{key}[{index}]")
    elif isinstance(node, Mapping | list):
        yield key, "{}" if isinstance(node, Mapping) else "[]"
    else:
        yield key, node
