"""The columns that a run prints for training, evaluation and the explicit prediction."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

Metrics = Mapping[str, float]

FIRST = 9
"""The width of the rows' names."""


@dataclass(frozen=True)
class Column:
    """One metric of a table: its name, heading, format and width."""

    metric: str
    heading: str
    text: str
    width: int
    factor: float = 1.0

    @property
    def name(self) -> str:
        """The metric without the stage of an evaluation."""
        stage, _, name = self.metric.partition("/")
        return self.metric if stage == "train" else name

    def cell(self, metrics: Metrics) -> str:
        """The metric as text, right-aligned; blank if it is missing."""
        value = metrics.get(self.metric)
        if value is None:
            return " " * self.width
        text = self.text.format(self.factor * value)
        if len(text) >= self.width or math.isnan(value):  # of a run that diverges
            text = f"{self.factor * value:.1e}"
        return f"{text:>{self.width}}"


@dataclass(frozen=True)
class Group:
    """Columns under a common title."""

    title: str
    columns: tuple[Column, ...]

    @property
    def width(self) -> int:
        return sum(column.width for column in self.columns)

    def without(self, name: str) -> "Group":
        """The group without a metric; see `_DROPPED`."""
        kept = [each for each in self.columns if name not in (each.metric, each.name)]
        return Group(self.title, tuple(kept))


def groups(
    evaluated: str,
    title: str,
    *,
    accuracy: bool,
    explicit: bool,
    loss: str = "{:.4f}",
    residual: bool = False,
) -> tuple[Group, ...]:
    """NFE, accuracy, loss and milliseconds per batch of training, evaluation, explicit prediction.

    evaluated: the stage of the second group ("val" or "test"). title: of that group.
    accuracy: whether the task has one. explicit: whether the model predicts without a solve.
    residual: whether training also shows the relative residual of the solver.
    """
    shown = (Column("train/residual", "residual", "{:.0e}", 9),) if residual else ()
    made = [
        Group("train", (*_columns("train/", accuracy=accuracy, loss=loss), *shown)),
        Group(title, _columns(f"{evaluated}/", accuracy=accuracy, loss=loss)),
    ]
    if explicit:
        columns = _columns(f"{evaluated}/explicit_", accuracy=accuracy, loss=loss)
        made.append(Group("explicit", columns[1:]))  # no solve: no NFE
    return tuple(made)


_DROPPED = (
    *("explicit_seconds", "train/seconds", "seconds", "train/residual", "explicit_loss"),
    *("train/accuracy", "explicit_accuracy", "train/nfe", "train/loss", "nfe", "loss"),
)
"""Metrics in the order in which a narrow terminal loses their columns; those without a stage are
of the evaluation.
"""


def fit(table: tuple[Group, ...], width: int) -> tuple[Group, ...]:
    """The table without the columns that do not fit beside the rows' names, `width` characters."""
    for name in _DROPPED:
        last = sum(len(group.columns) for group in table) == 1
        if last or sum(2 + group.width for group in table) <= width:
            break
        table = tuple(kept for group in table if (kept := group.without(name)).columns)
    return table


def _columns(prefix: str, *, accuracy: bool, loss: str) -> tuple[Column, ...]:
    share = (Column(f"{prefix}accuracy", "accuracy", "{:.2f} %", 10, 100.0),) if accuracy else ()
    return (
        Column(f"{prefix}nfe", "NFE", "{:.2f}", 7),
        *share,
        Column(f"{prefix}loss", "loss", loss, 10),
        Column(f"{prefix}seconds", "ms", "{:.1f}", 8, 1000.0),
    )


def heading(table: tuple[Group, ...], first: str) -> str:
    """Two lines: titles of groups and headings of columns. first: the heading of the row names."""
    titles = "".join(f"  {f'{group.title} '[: group.width]:─<{group.width}}" for group in table)
    names = "".join(
        "  " + "".join(f"{column.heading:>{column.width}}" for column in group.columns)
        for group in table
    )
    return f"{'':{max(FIRST, len(first))}}{titles}\n{first:{FIRST}}{names}"


def row(table: tuple[Group, ...], name: str, metrics: Metrics) -> str:
    """One line of the table."""
    cells = "".join(
        "  " + "".join(column.cell(metrics) for column in group.columns) for group in table
    )
    return f"{name:{FIRST}}{cells}".rstrip()


def duration(seconds: float) -> str:
    """A time in one unit: 40 s, 12 min, 3.4 h, 2.1 d."""
    for limit, divisor, text in (
        (90, 1, "{:.0f} s"),
        (5400, 60, "{:.0f} min"),
        (172_800, 3600, "{:.1f} h"),
    ):
        if seconds < limit:
            return text.format(seconds / divisor)
    return f"{seconds / 86400:.1f} d"
