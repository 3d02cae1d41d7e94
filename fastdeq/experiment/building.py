"""L8: parts of other libraries, whose errors get the key of the configuration that causes them."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hydra.errors import InstantiationException

T = TypeVar("T")


def build(key: str, make: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    """`make(**arguments)`, where `arguments` are the values of the node `key`.

    Raises: ValueError with the key of the argument that is to blame, or with that of the node where
    none can be found; InstantiationException, which has a key.
    """
    try:
        return make(**arguments)
    except InstantiationException:
        raise
    except Exception as error:
        blamed = _blamed(error, make, arguments)
        raise ValueError(f"{key if blamed is None else f'{key}.{blamed}'}: {error}") from error


def _blamed(
    error: Exception, make: Callable[..., object], arguments: Mapping[str, Any]
) -> str | None:
    """The first argument without which `make` succeeds, or else fails for another reason: without
    its negative momentum SGD would still be refused, for Nesterov's method needs one.
    """
    without = {
        name: _failure(make, {other: arguments[other] for other in arguments if other != name})
        for name in arguments
        if not name.startswith("_")  # Hydra's own, such as _target_
    }
    succeed = [name for name, failure in without.items() if failure is None]
    # Of the same type: a TypeError would only say that the argument is missing.
    differ = [
        name
        for name, failure in without.items()
        if type(failure) is type(error) and str(failure) != str(error)
    ]
    return next(iter(succeed + differ), None)


def _failure(make: Callable[..., object], arguments: Mapping[str, Any]) -> Exception | None:
    try:
        make(**arguments)
    except Exception as error:
        return error
    return None
