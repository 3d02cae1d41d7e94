"""Tables and notes on a terminal: columns that do not fit its width are left out."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

DROPPED = (
    *("prediction", "backward", "training", "minutes", "continuous", "parameters", "verdict"),
    *("jacobian", "runs", "experiment", "top5", "solver"),
)
"""Columns of the report, in the order in which a narrow terminal loses them."""

_FOLDED = {"settings": 24, "verdict": 24}
"""Columns whose text may have several lines, and the width from which on it has."""

_BETWEEN = 2  # blanks between two columns: one of padding, one of the box


def shown(
    table: Mapping[str, Sequence[str]], width: int, dropped: Sequence[str] = DROPPED
) -> tuple[str, list[str]]:
    """The table for a terminal, and the headings of the columns that do not fit.

    table: the columns by name: heading, then cells. dropped: columns in the order in which they
    are left out; others follow, the last one first.
    """
    kept = dict(table)
    rest = [name for name in list(table)[::-1] if name not in dropped]
    for name in (*dropped, *rest):
        if _width(kept) <= width or len(kept) <= 1:
            break
        kept.pop(name, None)
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for name, (heading, *cells) in kept.items():
        number = all(cell[:1].isdigit() or not cell for cell in cells)
        made.add_column(
            Text(heading),
            no_wrap=name not in _FOLDED,
            overflow="fold" if name in _FOLDED else "ellipsis",
            justify="right" if number and name not in _FOLDED else "left",
        )
    for line in zip(*(column[1:] for column in kept.values()), strict=True):
        made.add_row(*map(Text, line))
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(made)
    return capture.get().rstrip("\n"), [table[name][0] for name in table if name not in kept]


def listed(notes: Iterable[str], width: int) -> str:
    """Notes as a list, broken between words."""
    return "\n".join(
        textwrap.fill(
            f"- {note}",
            max(width, 20),
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for note in notes
    )


def _width(table: Mapping[str, Sequence[str]]) -> int:
    natural = {name: max(map(len, column)) for name, column in table.items()}
    least = [min(each, _FOLDED.get(name, each)) for name, each in natural.items()]
    return sum(least) + _BETWEEN * (len(least) - 1)
