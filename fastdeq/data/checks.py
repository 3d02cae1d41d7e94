"""Checks of single settings; each message names the setting."""

import math
from pathlib import Path


def require_integer(name: str, value: object, *, minimum: int) -> int:
    """Return ``value`` if it is an integer ≥ ``minimum``; raise ValueError that names it if not."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, not {value!r}")
    return value


def require_number(name: str, value: object) -> float:
    """Return ``value`` if it is a finite number; raise ValueError that names it if not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def require_folder(name: str, value: object) -> Path | None:
    """Return ``value`` as a path, or None; raise ValueError that names it if it is neither."""
    if value is None:
        return None
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"{name} must be the path of a folder, not {value!r}")
    return Path(value).expanduser()


def require_flag(name: str, value: object) -> bool:
    """Return ``value`` if it is true or false; raise ValueError that names it if not."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}")
    return value
