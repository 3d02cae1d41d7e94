"""The columns that a run prints for training, evaluation and the explicit prediction."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Column:
    """One metric of a table: its name, heading, format and width."""

    metric: str
    heading: str
    text: str
    width: int
    factor: float = 1.0

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
    titles = "".join(f"  {group.title + ' ':─<{group.width}}" for group in table)
    names = "".join(
        "  " + "".join(f"{column.heading:>{column.width}}" for column in group.columns)
        for group in table
    )
    return f"{'':{_FIRST}}{titles}\n{first:{_FIRST}}{names}"


def row(table: tuple[Group, ...], name: str, metrics: Metrics) -> str:
    """One line of the table."""
    cells = "".join(
        "  " + "".join(column.cell(metrics) for column in group.columns) for group in table
    )
    return f"{name:{_FIRST}}{cells}".rstrip()


_FIRST = 9  # width of the rows' names
