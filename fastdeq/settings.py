"""L0: settings are frozen, keyword-only dataclasses whose fields are checked when built.

Solvers and adjoints are made with `@settings`: printable, comparable, free of tensors, and exactly
the keys of their YAML. A misspelt or out-of-range field is refused with the cure in the message.
"""

import dataclasses
import difflib
import math
import numbers
import types
from collections.abc import Callable
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

_NUMBER_NAMES: dict[Any, str] = {float: "a number", int: "a whole number", bool: "true or false"}


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

    A method `check_together` is called last, for what single fields cannot tell.

    Raises (at construction): TypeError for an unknown field or a value of the wrong type,
    ValueError for a value out of range.
    """
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    plain_init: Callable[..., None] = made.__init__

    def __init__(self: Any, *args: Any, **given: Any) -> None:
        _check_names(type(self), args, given)
        plain_init(self, **given)
        _check_values(self)
        if hasattr(self, "check_together"):
            self.check_together()

    made.__init__ = __init__  # type: ignore[method-assign]
    return made


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


def _check_values(record: Any) -> None:
    hints = get_type_hints(type(record))
    for field in dataclasses.fields(record):
        value, where = getattr(record, field.name), f"{type(record).__name__}.{field.name}"
        if not fits(value, hints[field.name]):
            raise TypeError(f"{where} is {value!r}, but must be {describe(hints[field.name])}")
        bounds = field.metadata.get("bounds", {})
        if isinstance(value, numbers.Real) and not _within(float(value), bounds):
            wanted = " and ".join(f"{name} {_text(bound)}" for name, bound in bounds.items())
            raise ValueError(
                f"{where} is {value!r}, but must be finite{' and ' * bool(bounds)}{wanted}"
            )


def _text(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _within(value: float, bounds: dict[str, float]) -> bool:
    return (
        math.isfinite(value)
        and value > bounds.get("above", -math.inf)
        and bounds.get("at least", -math.inf) <= value <= bounds.get("at most", math.inf)
    )


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type that an annotation asks for; containers are not looked into."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(hint))
    if hint in (int, float):  # bool is an int in Python, but `max_steps=True` is a mistake
        kind = numbers.Integral if hint is int else numbers.Real  # NumPy's numbers too
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def describe(hint: Any) -> str:
    """An annotation in words, for messages."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    if hint is types.NoneType:
        return "None"
    return _NUMBER_NAMES.get(hint, f"a {getattr(hint, '__name__', hint)}")
