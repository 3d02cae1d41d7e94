"""The comparison as a table, and what follows from it."""

import math
from collections.abc import Iterator, Mapping

from rich.table import Table

from fastdeq.bench.compare import CONVERGED, COSINE, Combination, Comparison, Measured, Names

_NAMES = ("solver", "adjoint", "precision")
_NUMBERS = ("ms", "fwd", "bwd", "NFE", "VJPs", "residual", "conv.", "cosine", "MB")
WIDTH = 120
"""Characters that a row needs."""


def table(found: Comparison) -> Table:
    """One row per combination, the fastest first; the recommended one is marked."""
    made = Table(caption=_CAPTION, caption_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in (*_NAMES, *_NUMBERS):
        made.add_column(name, justify="left" if name in _NAMES else "right", no_wrap=True)
    for one in found.measured:
        style = "bold" if one is found.recommended else None if one.is_good else "dim"
        made.add_row(*_cells(one), style=style)
    return made


_CAPTION = (
    "ms: forward and backward; VJPs: of the backward solve; residual: the largest, relative; "
    "conv.: share of converged samples; cosine: to the exact gradient; MB: peak of the step"
)


def _cells(one: Measured) -> list[str]:
    forward, backward = (1000 * seconds for seconds in one.seconds)
    return [
        *one.combination.names,
        *(f"{ms:.2f}" for ms in (forward + backward, forward, backward)),
        f"{one.nfe:.1f}",
        "" if one.vjps is None else f"{one.vjps:.1f}",
        f"{one.residual:.1e}",
        f"{100 * one.converged:.0f} %",
        "nan" if math.isnan(one.cosine) else f"{one.cosine:.4f}",
        f"{one.memory / 1e6:.1f}",
    ]


def advice(
    found: Comparison,
    refused: Mapping[str, str],
    *,
    configured: Names,
    seconds: float,
    own: bool,
) -> Iterator[str]:
    """Lines: what is left out and why, and the recommendation as overrides, or as settings."""
    for name, why in _grouped(refused).items():
        yield f"left out: {name}: {why}"
    if found.late:
        names = ", ".join(" ".join(one.names) for one in found.late[:3])
        more = f" and {len(found.late) - 3} more" if len(found.late) > 3 else ""
        yield f"not measured within --seconds {seconds:g}: {names}{more}"
    if found.exact_residual > 1e-4:
        yield (
            "the exact gradient is approximate: its solve ended at a relative residual of "
            f"{found.exact_residual:.1e}"
        )
    yield ""
    best = found.recommended
    if best is None:
        yield (
            f"no combination has {100 * CONVERGED:.0f} % of its samples converged and a cosine of "
            f"at least {COSINE}: raise solver.max_steps and adjoint.solver.max_steps, or loosen "
            "solver.tol"
        )
        return
    yield f"recommended: {_overrides(best.combination, configured)}{_gain(best, found, configured)}"
    if own:
        one = best.combination
        yield f"settings: solver={one.solver}, adjoint={one.adjoint}, precision={one.precision!r}"


def _grouped(refused: Mapping[str, str]) -> dict[str, str]:
    """One line per reason."""
    names: dict[str, list[str]] = {}
    for name, why in refused.items():
        names.setdefault(why, []).append(name.split()[0])
    return {", ".join(dict.fromkeys(those)): why for why, those in names.items()}


def _overrides(one: Combination, configured: Names) -> str:
    solver, adjoint, _ = one.names
    words = [f"solver={solver}", f"adjoint={adjoint}"]
    if one.precision is not None or configured[2] != "float32":
        words.append(f"precision={one.precision or 'null'}")
    return " ".join(words)


def _gain(best: Measured, found: Comparison, configured: Names) -> str:
    before = [one for one in found.measured if one.combination.names == configured]
    if not before:
        return ""
    if before[0] is best:
        return "  (as configured)"
    return f"  ({sum(before[0].seconds) / sum(best.seconds):.2f} times as fast as configured)"
