"""The classes and functions that `_target_` names."""

import difflib
from contextlib import suppress
from typing import Any

from hydra._internal.utils import _locate

from fastdeq.extras import MissingExtra

_WHOLE = "but must be the dotted name of a class or a function, package.module.Name"


def locate(key: str, name: Any) -> Any:
    """The class or function that `key` names.

    Raises: TypeError or ValueError, with one sentence that says which part of the name does not
        exist.
    """
    if not isinstance(name, str) or not all(name.split(".")):
        raise TypeError(f"{key} is {name!r}, {_WHOLE}")
    try:
        target = _locate(name)  # as get_object of hydra.utils, which also logs the error
    except Exception as error:  # whatever a module raises that is imported for it
        raise ValueError(f"{key} is {name!r}, {_reason(name, error.__cause__ or error)}") from error
    if not callable(target):
        raise TypeError(f"{key} is {name}, which is not a class or function, but a {type(target)}")
    return target


def _reason(name: str, cause: BaseException) -> str:
    if isinstance(cause, MissingExtra):
        return f"but {cause}"
    parent, names = _existing(name)
    missing = name.removeprefix(f"{parent}.").partition(".")[0]
    where = f"{parent}.{missing}" if parent else missing
    absent = isinstance(cause, ModuleNotFoundError | AttributeError) and cause.name
    if absent not in (missing, where):
        first = str(cause).partition("\n")[0]
        return f"but {where} cannot be imported ({type(cause).__name__}: {first})"
    if parent:
        return f"but {parent} has no {missing!r}{_similar(missing, parent, names)}"
    if missing == name:
        return _WHOLE
    return f"but there is no package {missing!r}: is it installed, or its folder on PYTHONPATH?"


def _existing(name: str) -> tuple[str, list[str]]:
    """The longest start of a dotted name that exists, and the public names in it."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        start = ".".join(parts[:length])
        with suppress(Exception):
            return start, [each for each in dir(_locate(start)) if not each.startswith("_")]
    return "", []


def _similar(missing: str, parent: str, names: list[str]) -> str:
    """A suggestion, or an empty string; `Digits` is similar to `DigitsDataModule`."""
    names = [name for name in names if name[0].isupper() == missing[0].isupper()]
    found = difflib.get_close_matches(missing, names, n=1, cutoff=0.7)
    found += [name for name in names if missing.lower() in name.lower()]
    return f"; did you mean {parent}.{found[0]}?" if found else ""
