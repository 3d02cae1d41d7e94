"""The arguments of constructors and functions, and their annotations."""

import functools
import inspect
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_overloads, get_type_hints


@dataclass(frozen=True)
class Signature:
    """The arguments of a constructor or function: names, names without a default, annotations.

    others: whether other keywords are accepted. other: their annotation.
    rest: the annotation of further positional arguments.
    """

    names: tuple[str, ...]
    needed: tuple[str, ...]
    hints: dict[str, Any]
    others: bool = False
    other: Any = Any
    rest: Any = Any

    def position(self, place: int) -> Any:
        """The annotation of a positional argument."""
        return self.hints.get(self.names[place], Any) if place < len(self.names) else self.rest


@functools.cache
def signature_of(target: Any) -> Signature:
    """The signature of a callable; one without a signature accepts everything."""
    if is_plain_dataclass(target):  # its __init__ may be a checking one that accepts anything
        own = [field for field in fields(target) if field.init]
        needed = (f.name for f in own if f.default is MISSING and f.default_factory is MISSING)
        names = tuple(field.name for field in own)
        return Signature(names, tuple(needed), _hints(target))
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # of some that are written in C
        return Signature((), (), {}, others=True)
    hints = _hints_of_class(target) if inspect.isclass(target) else _hints(target)
    ordinary = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    various = {p.kind: hints.pop(p.name, Any) for p in parameters if p not in ordinary}
    return Signature(
        names=tuple(p.name for p in ordinary),
        needed=tuple(p.name for p in ordinary if p.default is p.empty),
        hints=hints,
        others=inspect.Parameter.VAR_KEYWORD in various,
        other=various.get(inspect.Parameter.VAR_KEYWORD, Any),
        rest=various.get(inspect.Parameter.VAR_POSITIONAL, Any),
    )


def is_plain_dataclass(target: Any) -> bool:
    """Whether the fields of a dataclass are its arguments: not if a subclass adds `__init__`."""
    if not inspect.isclass(target):
        return False
    owner = next(parent for parent in target.__mro__ if "__init__" in vars(parent))
    return is_dataclass(target) and "__dataclass_fields__" in vars(owner)


def _hints_of_class(cls: type) -> dict[str, Any]:
    """The hints of `__init__`, and as long as it passes on keywords, those of its parents."""
    hints: dict[str, Any] = {}
    for parent in cls.__mro__:
        if "__init__" in vars(parent):
            init = vars(parent)["__init__"]
            hints = _hints(init) | hints
            code = getattr(inspect.unwrap(init), "__code__", None)
            if code is None or not code.co_flags & inspect.CO_VARKEYWORDS:
                break
    return hints


def _hints(target: Any) -> dict[str, Any]:
    """The hints of a function; without any, those of its first overload."""
    try:
        hints = get_type_hints(target)
        return hints or next(map(get_type_hints, get_overloads(target)), {})
    except (NameError, TypeError, AttributeError):  # of libraries that hide their types
        return {}
