"""Exceptions as one-line messages for the user."""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from torch.multiprocessing.spawn import ProcessRaisedException

from fastdeq.experiment.rendezvous import RankFailed
from fastdeq.experiment.signatures import signature_of
from fastdeq.experiment.targets import locate
from fastdeq.extras import MissingExtra
from fastdeq.training import TrainingFailed


def explain(error: BaseException) -> str:
    """One line that says what is wrong and, if known, the cure."""
    for kind, sentence in _KINDS:
        if isinstance(error, kind):
            return _one_line(sentence(error))
    if type(error).__name__ == "UncompletedJobError":  # of submitit, with all that was printed
        job, what = [*str(error).splitlines(), ""][:2]
        return f"{job} {what}; the sweep's other jobs continue: start it again to collect them"
    plain = isinstance(error, ValueError | TypeError | OSError | MissingExtra)
    name = "" if plain else f"{type(error).__name__}: "
    return _one_line(f"{name}{error}" if str(error) else type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion of similar known names, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(repr(each) for each in found)}?" if found else ""


def _missing_choice(error: MissingConfigException) -> str:
    options = list(error.options or ())
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return str(error)
    if (group, choice) == ("hydra/sweeper", "optuna"):  # what hydra/sweeper=search is made of
        return str(MissingExtra("hydra/sweeper=search", "hydra_plugins.hydra_optuna_sweeper"))
    if (group, choice) == ("arch", "none"):  # the arch of a multiscale model has the recipe's name
        return f"recipe=none has no arch: give arch=, one of {', '.join(options)}"
    similar = nearest(choice, options)
    title = " choices" if similar else "; choices"
    return f"there is no {group}={choice}{similar}{_listing(title, options)}"


def _composition(error: ConfigCompositionException) -> str:
    cause = error.__cause__
    if isinstance(cause, ValidationError):  # of a launcher's keys, which have types
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    if isinstance(cause, ConfigKeyError) or hasattr(cause, "parent_node"):
        key = str(getattr(cause, "full_key", "") or _quoted(error))
        parent = getattr(cause, "parent_node", None)
        if isinstance(parent, ListConfig):
            return f"{key} is a list, into which no mapping fits: write {key}=[...]"
        prefix = f"{key.rpartition('.')[0]}." if "." in key else ""
        known = [f"{prefix}{name}" for name in (parent or ()) if not str(name).startswith("_")]
        names = sorted(name for name in known if name != "hydra")
        if owner := _accepts(parent, key.rpartition(".")[2]):
            return f"{key} is an option of {owner} that its file does not list: write +{key}=VALUE"
        return f"there is no key '{key}'{nearest(key, names) or _listing('; keys', names)}"
    return str(error)


def _accepts(node: Any, name: str) -> str | None:
    """The name of the class that a node builds, if it has an argument that the node lacks."""
    if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
        return None
    try:
        target = locate("_target_", node["_target_"])
    except (TypeError, ValueError):  # reported elsewhere
        return None
    return target.__name__ if name in signature_of(target).names else None


def _listing(title: str, names: list[str]) -> str:
    return f"{title}: {', '.join(names)}" if names else ""


def _quoted(error: BaseException) -> str:
    found = re.search(r"'([^']+)'", str(error))
    return found.group(1) if found else str(error)


def _instantiation(error: InstantiationException) -> str:
    found = re.search(r"full_key: (\S+)", str(error))
    key = found.group(1) if found else ""
    if target := re.match(r"Error locating target '([^']*)'", str(error)):
        try:
            locate(f"{key}._target_".lstrip("."), target.group(1))
        except (TypeError, ValueError) as reason:
            return str(reason)
    cause = error.__cause__
    text = explain(cause) if cause is not None else str(error).splitlines()[0]
    return f"{key}: {text}" if key else text


def _resolution(error: InterpolationResolutionError) -> str:
    text = str(error).splitlines()[0]
    if error.parent_node is None:
        return f"{error.full_key}: {text}"
    siblings: Any = OmegaConf.to_container(error.parent_node, resolve=False)
    made_of = str(siblings[error.key])
    found = re.fullmatch(r"Interpolation key '(.+)\.(.+)' not found", text)
    keys = OmegaConf.select(error.parent_node._get_root(), found[1]) if found else None
    if found is None or not isinstance(keys, DictConfig):
        return f"{error.full_key}, which is {made_of}: {text}"
    if chosen_by := re.search(r"\.\$\{([\w.]+)\}\}", made_of):
        return f"{chosen_by[1]} is {found[2]!r}, but must be one of {', '.join(map(repr, keys))}"
    if found[1] == "arch":  # one that was named; each data set brings some that fit
        text = f"this arch has no '{found[2]}': leave arch= out, or choose another arch"
    else:
        names = [f"{found[1]}.{name}" for name in map(str, keys)]
        text = f"there is no key '{found[1]}.{found[2]}'{_listing('; keys', names)}"
    return f"{error.full_key}: {text}"


def _process(error: ProcessRaisedException) -> str:
    """The last line of the traceback of the process that failed first. All processes reach the same
    verdict on a failed step, so that message names no process.
    """
    last = str(error).strip().splitlines()[-1]
    name, _, text = last.partition(": ")
    of_all = name == f"{TrainingFailed.__module__}.{TrainingFailed.__qualname__}"
    return text if of_all else f"a process failed: {last}"


def _parsing(error: OverrideParseException) -> str:
    text = str(error.override)
    if "=" not in text:
        return f"'{text}' sets nothing: write {text}=VALUE"
    return f"cannot read '{text}': {str(error).splitlines()[0]}"


_KINDS: tuple[tuple[type[Exception], Callable[[Any], str]], ...] = (
    (MissingConfigException, _missing_choice),
    (OverrideParseException, _parsing),
    (ConfigCompositionException, _composition),
    (InstantiationException, _instantiation),
    (InterpolationResolutionError, _resolution),
    (OmegaConfBaseException, lambda error: str(error).splitlines()[0]),
    (ProcessRaisedException, _process),
    (RankFailed, str),
    (TrainingFailed, str),
)


def _one_line(text: str) -> str:
    return " ".join(text.split())
