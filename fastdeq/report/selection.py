"""Which runs and rows of a report are shown: --where and --sort, in the words of overrides."""

import json
from collections.abc import Iterable, Sequence

from fastdeq.commands import UsageError, unknown_name
from fastdeq.runs.identity import Leaf
from fastdeq.runs.reading import Run

Condition = tuple[str, tuple[str, ...]]
"""A key, and the values of which a run must have one."""


def condition(text: str) -> Condition:
    """A condition as it is typed: KEY=VALUE or KEY=VALUE,VALUE.

    Raises: UsageError for one without a value.
    """
    key, equals, values = text.partition("=")
    if not (key and equals and values):
        raise UsageError(f"--where is {text!r}, but must be KEY=VALUE, such as model=deq,skip_deq")
    return key, tuple(values.split(","))


def names(text: str) -> tuple[str, ...]:
    """Names that are separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def matching(runs: Iterable[Run], conditions: Sequence[Condition]) -> list[Run]:
    """The runs that meet all conditions. A key is a group (model=deq), or that of a setting
    (solver.tol=1e-3).

    Raises: ValueError for a key that no run has, and if no run is left.
    """
    kept = list(runs)
    for key, values in conditions:
        if not any(key in run.choices or key in run.settings for run in kept):
            known = sorted({each for run in kept for each in (*run.choices, *run.settings)})
            raise ValueError(unknown_name("key of --where", key, known))
        found = {_value(run, key) for run in kept}
        kept = [run for run in kept if any(_equal(_value(run, key), value) for value in values)]
        if not kept:
            there = ", ".join(sorted(map(_text, found)))
            raise ValueError(f"no run has {key}={','.join(values)}: there are {there}")
    return kept


def _value(run: Run, key: str) -> Leaf:
    return run.choices.get(key, run.settings.get(key))


def _equal(value: Leaf, text: str) -> bool:
    """Whether a value is meant; numbers are compared as numbers."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return _text(value) == text


def _text(value: Leaf) -> str:
    """The value in the form of an override."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
