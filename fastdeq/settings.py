"""Settings are frozen, keyword-only dataclasses whose fields are checked when built.

Solvers and adjoints are made with `@settings`: printable, comparable, free of tensors, and exactly
the keys of their YAML. A misspelt or out-of-range field is refused with the cure in the message.
"""

import dataclasses
import difflib
import math
import numbers
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import repeat
from typing import (
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

_T = TypeVar("_T")

_NAMES: dict[Any, str] = {
    **{float: "a number", int: "a whole number", bool: "true or false", str: "text"},
    Callable: "a partial call (_partial_: true)",
}


def setting(
    *,
    default: Any = dataclasses.MISSING,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field with a range: `above` is exclusive, `at_least` and `at_most` are inclusive."""
    bounds = {"above": above, "at least": at_least, "at most": at_most}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"bounds": given})
    return dataclasses.field(default=default, metadata={"bounds": given})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting,))
def settings(cls: type[_T]) -> type[_T]:
    """Class decorator: a frozen keyword-only dataclass that checks names, types and ranges.

    A method `validate` is called last, to check combinations of fields.

    Raises (at construction): TypeError for an unknown field or a value of the wrong type,
    ValueError for a value out of range.
    """
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    plain_init: Callable[..., None] = made.__init__

    def __init__(self: Any, *args: Any, **given: Any) -> None:
        _check_names(type(self), args, given)
        plain_init(self, **given)
        check_fields(self)
        if hasattr(self, "validate"):
            self.validate()

    made.__init__ = __init__  # type: ignore[method-assign]
    return made


def brief(value: Any) -> str:
    """The repr of settings without the fields that have their default; other values as text."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return str(value)
    fields = [field for field in dataclasses.fields(value) if field.repr]
    given = {field: getattr(value, field.name) for field in fields}
    parts = [f"{f.name}={_brief(each)}" for f, each in given.items() if each != f.default]
    return f"{type(value).__name__}({', '.join(parts)})"


def _brief(value: Any) -> str:
    return brief(value) if dataclasses.is_dataclass(value) else repr(value)


def _check_names(cls: type, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    listing = f"its fields are {', '.join(names)}"
    if args:
        raise TypeError(f"{cls.__name__} takes keyword arguments only; {listing}")
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise TypeError(f"{cls.__name__} has no field '{name}'; {hint}{listing}")


def check_fields(record: Any) -> None:
    """Check a dataclass's fields against their annotations and the bounds of `setting`.

    Raises: TypeError or ValueError as `check_value`; the message begins with <class>.<field>.
    """
    hints = get_type_hints(type(record))
    for field in dataclasses.fields(record):
        where, bounds = f"{type(record).__name__}.{field.name}", field.metadata.get("bounds", {})
        check_value(where, getattr(record, field.name), hints[field.name], bounds)


def check_value(where: str, value: Any, hint: Any, bounds: Mapping[str, float]) -> None:
    """Raises: TypeError for a value that does not fit its annotation, ValueError out of bounds."""
    if not fits(value, hint):
        raise TypeError(f"{where} is {value!r}, but must be {describe(hint)}")
    check_bounds(where, value, bounds)


def check_bounds(where: str, value: Any, bounds: Mapping[str, float]) -> None:
    """Raises: ValueError for a number that is not finite or not within the bounds of `setting`."""
    if isinstance(value, numbers.Real) and not _within(value, bounds):
        wanted = " and ".join(f"{name} {bound:.10g}" for name, bound in bounds.items())
        raise ValueError(
            f"{where} is {value!r}, but must be finite{' and ' * bool(bounds)}{wanted}"
        )


def _within(value: Any, bounds: Mapping[str, float]) -> bool:
    return (
        (
            isinstance(value, numbers.Integral) or math.isfinite(value)
        )  # large integers have no float
        and value > bounds.get("above", -math.inf)
        and bounds.get("at least", -math.inf) <= value <= bounds.get("at most", math.inf)
    )


def fits(value: Any, hint: Any, has_type: Callable[[Any, type], bool] = isinstance) -> bool:
    """Whether a value has the type of an annotation, including the elements of containers.

    A list fits where a tuple or a sequence is annotated, since YAML has only lists. Annotations
    that are not types (`Any`, a type variable) fit everything.

    has_type: replaces `isinstance`, for values that do not exist yet.
    """
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option, has_type) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin in (int, float):  # bool is an int in Python, but `max_steps=True` is a mistake
        kind = numbers.Integral if origin is int else numbers.Real  # NumPy's numbers too
        return has_type(value, kind) and not isinstance(value, bool)
    if not isinstance(origin, type) or origin is Any:  # which is a class since Python 3.11
        return True
    if isinstance(value, list | tuple) and _is_sequence(origin):
        kinds = _kinds(arguments, len(value))
        return len(kinds) == len(value) and all(map(fits, value, kinds, repeat(has_type)))
    if isinstance(value, Mapping) and issubclass(origin, Mapping) and arguments:
        names, values = arguments
        return all(fits(n, names, has_type) and fits(v, values, has_type) for n, v in value.items())
    return has_type(value, origin) and not (isinstance(value, str) and _is_sequence(origin))


def _is_sequence(kind: type) -> bool:
    """Whether a YAML list fits: not for text, mappings and sets."""
    return issubclass(kind, list | tuple) or kind in (Sequence, Iterable, Collection)


def _kinds(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The types of the elements: list[int] has one for all, tuple[int, str] one for each."""
    if not arguments:
        return (Any,) * count
    return arguments if len(arguments) > 1 and Ellipsis not in arguments else arguments[:1] * count


def describe(hint: Any) -> str:
    """An annotation in words, for messages."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(map(repr, arguments))
    if origin is types.NoneType:
        return "None"
    if isinstance(origin, type) and _is_sequence(origin):
        inner = [describe(kind) for kind in arguments if kind is not Ellipsis]
        if len(inner) == 1:
            return f"a list, each {inner[0]}"
        return f"a list ({', '.join(inner)})" if inner else "a list"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    name = str(getattr(origin, "__name__", origin))
    return _NAMES.get(origin, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")
