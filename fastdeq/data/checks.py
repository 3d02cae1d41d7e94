"""Checks of single settings; each message names the setting."""

import math


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
