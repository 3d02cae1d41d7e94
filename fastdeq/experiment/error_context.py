"""Adds the key of the configuration to the error of a part."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from fastdeq.experiment.arguments import named, places_of
from fastdeq.experiment.explain import explain


@contextmanager
def error_context(cfg: DictConfig, key: str) -> Iterator[None]:
    """Make an error of the node at `key` name the typed key: the key of the argument that the
    message begins with, or else all typed keys that the node depends on.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        if isinstance(error, InstantiationException):  # of a node below, and for a reason
            cause = error.__cause__ or error
            if found := re.search(r"full_key: (\S+)", str(error)):
                key = found.group(1)
        text = _named(cfg, key, explain(cause))
        raise (type(cause) if type(cause) in _PLAIN else ValueError)(text) from error


_PLAIN = (ValueError, TypeError, FileNotFoundError, FileExistsError, OSError)
"""Errors that consist of a message, so that they can be raised again with a longer one."""


def _named(cfg: DictConfig, key: str, text: str) -> str:
    key, places, below = places_of(cfg, key)
    text = named(text, places, key)
    typed = _typed()
    if any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) for name in typed):
        return text
    given = [name for name in typed if _reaches(name, set(places.values()))]
    given = given or [name for name in typed if _reaches(name, below)]
    said = [name for name in given if re.search(rf"\b{name.rpartition('.')[2]}\b", text)]
    words = ", ".join(typed[name] for name in said or given)
    return f"{text} (given {words})" if given else text


def _typed() -> dict[str, str]:
    """The overrides of this job that set values, by key, without the choices of groups."""
    hydra = HydraConfig.get()
    words = list(hydra.overrides.task)
    parsed = OverridesParser.create().parse_overrides(words)
    typed = {str(override.key_or_group): word for override, word in zip(parsed, words, strict=True)}
    return {key: word for key, word in typed.items() if key not in hydra.runtime.choices}


def _reaches(name: str, keys: set[str]) -> bool:
    return any(re.match(rf"{re.escape(name)}(?![^.\[])", key) for key in keys)
