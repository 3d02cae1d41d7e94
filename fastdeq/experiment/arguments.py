"""Checks the values of a configuration against the annotations of the arguments that they fill.

Nothing is built. A value that comes from an interpolation is named by the key that defines it.
"""

import functools
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from pytorch_lightning import Trainer
from torch import nn
from torch.optim import Optimizer

from fastdeq.experiment.explain import nearest
from fastdeq.experiment.signatures import is_plain_dataclass, signature_of
from fastdeq.experiment.targets import locate
from fastdeq.settings import check_bounds, describe, fits

_DIRECTIVES = {
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": Literal["none", "partial", "object", "all"],
    "_args_": list[Any],
}
"""Hydra's other keys of a node with a `_target_`."""


@dataclass(frozen=True)
class Made:
    """A placeholder for the object that a node with a `_target_` builds.

    kind: its class; None if no annotation says which. partial: whether the node builds a partial.
    """

    target: str
    kind: type | None
    partial: bool

    def __repr__(self) -> str:
        return self.target


class Record:
    """Base of the @settings classes that declare a mapping without a `_target_`."""


LIMITS: dict[tuple[type, str], dict[str, float]] = {
    **{(Trainer, f"limit_{part}_batches"): {"above": 0} for part in ("train", "test")},
    (Trainer, "limit_val_batches"): {"at least": 0},
    (Trainer, "overfit_batches"): {"at least": 0},
    (Trainer, "check_val_every_n_epoch"): {"at least": 1},
    (Trainer, "accumulate_grad_batches"): {"at least": 1},
    (Trainer, "log_every_n_steps"): {"at least": 0},
    (Trainer, "num_sanity_val_steps"): {"at least": -1},
    (Trainer, "num_nodes"): {"at least": 1},
    (Trainer, "gradient_clip_val"): {"above": 0},
    (Optimizer, "lr"): {"at least": 0},
    (Optimizer, "weight_decay"): {"at least": 0},
}
"""Ranges of arguments that their libraries do not check, or check late or without their name."""


def check_node(node: Node | None, key: str, hint: Any) -> Any:
    """Check the value of a key and everything below it; return the value in plain containers.

    hint: the annotation of the value.

    Raises: TypeError or ValueError, with the key that defines the value and what it must be.
    """
    if node is None:
        if not fits(None, hint):
            raise TypeError(f"{key} is missing, but must be {_describe(hint)}")
        return None
    node = _followed(node)
    value = _read(node, hint)
    _expect(node, value, hint)
    return value


def places_of(cfg: DictConfig, key: str) -> tuple[str, dict[str, str], set[str]]:
    """The key that defines a node, those of its arguments by name, and all keys below it."""
    # OmegaConf itself leaves out the dot before the index of a list's element.
    node = OmegaConf.select(cfg, re.sub(r"(?<=_args_)(?=\d)", ".", key))
    if not isinstance(node, DictConfig):
        return key, {}, set()
    arguments = {str(name): _key(child) for name, child in _children(node)}
    return _key(node), arguments, set(_origins(node))


def unknown(key: str, known: Iterable[str]) -> str:
    """The message for an unknown key."""
    return f"there is no key '{key}'{nearest(key, known)}"


def _origins(node: Node) -> Iterator[str]:
    yield _key(node)
    for _, child in _children(node):
        yield from _origins(child)


def _read(node: Node, hint: Any = Any) -> Any:
    """The value in plain containers, with `Made` for objects, whose arguments are checked."""
    if node._is_missing():
        raise ValueError(f"{_key(node)} has no value: give {_key(node)}=VALUE")
    if isinstance(node, DictConfig) and "_target_" in node:
        return _check_made(node)
    if isinstance(node, DictConfig) and not node._is_none():
        for record in _options(hint):
            if _is_record(record):
                _check_call(node, record)
                return Made(record.__name__, record, partial=False)
        inner = _element(hint)
        return {name: _read(child, inner) for name, child in _children(node)}
    if isinstance(node, ListConfig) and not node._is_none():
        return [_read(child, _element(hint)) for _, child in _children(node)]
    value = node._value()
    check_bounds(_key(node), value, {})
    if isinstance(value, int) and abs(value) >= 2**63:  # tensors hold no such number
        raise ValueError(f"{_key(node)} is {value}, but must be below 2**63")
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _element(hint: Any) -> Any:
    """The annotation of the elements of a list or a mapping, if they have a common one."""
    found = [get_args(option)[-1] for option in _options(hint) if get_args(option)]
    return found[0] if len(found) == 1 else Any


def _children(node: Node) -> Iterator[tuple[Any, Node]]:
    if isinstance(node, DictConfig | ListConfig) and not node._is_none():
        for name in node if isinstance(node, DictConfig) else range(len(node)):
            yield name, _child(node, name)


def _child(node: DictConfig | ListConfig, name: Any) -> Node:
    child = node._get_node(name)
    assert isinstance(child, Node)
    try:
        return _followed(child)
    except InterpolationResolutionError:
        _ = node[name]  # raises the error again, with the key
        raise


def _followed(node: Node) -> Node:
    """The node that an interpolation leads to."""
    while node._is_interpolation():
        target = node._dereference_node()
        assert target is not None  # or resolving had failed before
        node = target
    return node


def _key(node: Node) -> str:
    """The key in Hydra's form, with the index of a list's element after a dot."""
    parent, name = node._get_parent(), node._key()
    if parent is None or name is None:
        return ""
    return f"{_key(parent)}.{name}".lstrip(".")


def _check_made(node: DictConfig) -> Made:
    name = _read(_child(node, "_target_"))
    target = locate(_key(_child(node, "_target_")), name)
    for directive, hint in _DIRECTIVES.items():
        if directive in node:
            _expect(_child(node, directive), _read(_child(node, directive)), hint)
    for place, child in _children(_child(node, "_args_")) if "_args_" in node else ():
        _expect(child, _read(child), signature_of(target).position(place))
    _check_call(node, target)
    kind = target if inspect.isclass(target) else signature_of(target).hints.get("return")
    kind = get_origin(kind) or kind
    return Made(name, kind if isinstance(kind, type) else None, node.get("_partial_") is True)


def _check_call(node: DictConfig, target: Any) -> None:
    """Check names, completeness, types and ranges of the arguments."""
    signature, key = signature_of(target), _key(node)
    children = {str(name): child for name, child in _children(node) if str(name)[:1] != "_"}
    for name in children:
        if name not in signature.names and not signature.others:
            raise TypeError(unknown(f"{key}.{name}", [f"{key}.{n}" for n in signature.names]))
    complete = node.get("_partial_") is True or "_args_" in node
    for name in () if complete else signature.needed:
        if name not in children:
            raise TypeError(f"{key}.{name} is missing, which {target.__name__} needs")
    values = {}
    for name, child in children.items():
        hint = signature.hints.get(name, signature.other)
        values[name] = _read(child, hint)
        _expect(child, values[name], hint)
        if inspect.isclass(target):
            limits = (
                LIMITS[kind, of] for kind, of in LIMITS if of == name and issubclass(target, kind)
            )
            check_bounds(_key(child), values[name], next(limits, {}))
    if is_plain_dataclass(target) and not any(map(_holds_made, values.values())):
        _check_ranges(target, values, {name: _key(child) for name, child in children.items()}, key)


def _check_ranges(target: type, values: dict[str, Any], places: dict[str, str], key: str) -> None:
    """Check the ranges of a @settings class by building it; messages begin with <class>.<field>."""
    try:
        target(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(named(str(error), places, key)) from error


def named(text: str, places: Mapping[str, str], key: str) -> str:
    """The error message of a constructor, with the key of the argument in place of the argument's
    name. If the first word is not an argument, <class>.<argument> or <argument>.<key>, the message
    is prefixed with the key of the node.
    """
    word = text.split(" ", 1)[0]
    parts = word.split(".")
    for number, part in enumerate(parts):
        if part in places:
            return ".".join([places[part], *parts[number + 1 :]]) + text.removeprefix(word)
    return f"{key}: {text}" if key else text


def _holds_made(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_made, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Made)


def _expect(node: Node, value: Any, hint: Any) -> None:
    """Raises: TypeError for a value of a wrong type; in a list, for the wrong element."""
    if fits(value, hint, _has_type):
        return
    if isinstance(value, dict | list) and fits(type(value)(), hint):
        for name, child in _children(node):
            _expect(child, value[name], _element(hint))
    raise TypeError(f"{_key(node)} is {value!r}, but must be {_describe(hint)}")


def _describe(hint: Any) -> str:
    for record in _options(hint):
        if _is_record(record):
            return f"a mapping with the keys {', '.join(signature_of(record).names)}"
    return describe(hint)


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Record)


def _has_type(value: Any, kind: type) -> bool:
    """`isinstance` that also accepts placeholders (`Made`)."""
    try:
        if isinstance(value, Made):
            if value.kind and issubclass(value.kind, nn.Module) and issubclass(kind, nn.Module):
                return True  # the receiver checks which module fits
            is_made = value.kind is None or issubclass(value.kind, kind)
            return is_made or (value.partial and issubclass(functools.partial, kind))
        return isinstance(value, kind) or (isinstance(value, str) and issubclass(kind, os.PathLike))
    except TypeError:  # a class that does not support such checks
        return True
