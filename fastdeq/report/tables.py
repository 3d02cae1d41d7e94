"""Rows of a report as Markdown, CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdeq.commands import unknown_name
from fastdeq.report.configuration import NONE
from fastdeq.report.markdown import aligned
from fastdeq.report.rows import METRICS, Row
from fastdeq.report.verdict import Metric


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, the text of a row, and what rows are sorted by."""

    heading: str
    cell: Callable[[Row], str]
    value: Callable[[Row], Any]


def _metric_column(metric: str, heading: str, text: str, factor: float = 1.0) -> Column:
    def pair(mean: float | None, deviation: float | None) -> str:
        if mean is None:
            return ""
        spread = "" if deviation is None else f" ± {text.format(factor * deviation)}"
        return text.format(factor * mean) + spread

    def cell(row: Row) -> str:
        """mean ± deviation [published ± deviation], without unknown parts."""
        found = row.metric(metric)
        parts = [pair(found.mean, found.deviation)]
        if 0 < found.n < row.seeds:
            parts.append(f"(n = {found.n})")
        if published := pair(found.published, found.published_deviation):
            parts.append(f"[{published}]")
        return " ".join(part for part in parts if part)

    return Column(heading, cell, lambda row: row.metric(metric).mean)


def _text_column(heading: str, cell: Callable[[Row], str]) -> Column:
    return Column(heading, cell, cell)


COLUMNS: dict[str, Column] = {
    "experiment": _text_column("experiment", lambda row: row.label.experiment),
    "model": _text_column("model", lambda row: row.label.model),
    "solver": _text_column("solver", lambda row: row.label.solver),
    "continuous": _text_column("continuous", lambda row: _yes(row.label.continuous)),
    "jacobian": _text_column("Jacobian reg.", lambda row: _yes(row.label.jacobian)),
    "settings": _text_column("settings", lambda row: row.settings),
    "parameters": Column("parameters", lambda row: _parameters(row), lambda row: row.parameters),
    "runs": Column("runs", lambda row: _runs(row), lambda row: len(row.runs)),
    "accuracy": _metric_column("test/accuracy", "test accuracy %", "{:.2f}", 100.0),
    "top5": _metric_column("test/accuracy_top5", "top-5 %", "{:.2f}", 100.0),
    "loss": _metric_column("test/loss", "test loss", "{:.3g}"),
    "nfe": _metric_column("test/nfe", "test NFE", "{:.2f}"),
    "training": _metric_column("train/seconds", "training s/batch", "{:.3g}"),
    "backward": _metric_column("train/backward_seconds", "backward s/batch", "{:.3g}"),
    "prediction": _metric_column("test/seconds", "prediction s/batch", "{:.3g}"),
    "minutes": _metric_column("training_minutes", "training min", "{:.1f}"),
    "verdict": _text_column("verdict", lambda row: row.verdict.text),
}
"""The columns by the names that --columns and --sort take."""


def column(name: str, rows: Sequence[Row]) -> Column:
    """A column by its name, or that of a metric in summary.json.

    Raises: ValueError for a name that is neither.
    """
    metrics = {metric for row in rows for run in row.runs for metric in run.metrics}
    if name in COLUMNS:
        return COLUMNS[name]
    if name in metrics:
        return _metric_column(name, name, "{:.4g}")
    raise ValueError(unknown_name("column", name, [*COLUMNS, *sorted(metrics)]))


def markdown(rows: Sequence[Row], chosen: Sequence[str] = ()) -> str:
    """The table with aligned columns."""
    return aligned([list(line) for line in zip(*cells(rows, chosen).values(), strict=True)])


def cells(rows: Sequence[Row], chosen: Sequence[str] = ()) -> dict[str, list[str]]:
    """The columns by name: heading, then the cells of the rows.

    chosen: names; empty: those of COLUMNS that are not empty in all rows.
    """
    if chosen:
        made = {name: column(name, rows) for name in chosen}
        return {name: [c.heading, *map(c.cell, rows)] for name, c in made.items()}
    table = {name: [c.heading, *map(c.cell, rows)] for name, c in COLUMNS.items()}
    if len({row.label.experiment for row in rows}) < 2:
        del table["experiment"]
    judged_by_loss = [row.judged_by_loss for row in rows]
    table["loss"][1:] = [
        cell if judged else ""
        for cell, judged in zip(table["loss"][1:], judged_by_loss, strict=True)
    ]
    return {name: column for name, column in table.items() if any(column[1:])}


def ordered(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """The rows sorted by columns, the first key first; "-name": the largest first. Rows without a
    value come last.

    Raises: ValueError for a column that there is not.
    """
    done = list(rows)
    for key in reversed(keys):
        value = column(key.removeprefix("-"), rows).value
        known = [row for row in done if _known(value(row))]
        others = [row for row in done if not _known(value(row))]
        done = [*sorted(known, key=value, reverse=key.startswith("-")), *others]
    return done


def _known(value: Any) -> bool:
    return value is not None and value == value  # NaN is not


def comma_separated(rows: Sequence[Row]) -> str:
    """One column per number, in the units of summary.json; the columns are always the same."""
    text = io.StringIO()
    lines = [_flat(row) for row in rows]
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().rstrip("\n")


def json_text(rows: Sequence[Row]) -> str:
    """A list of rows with their metrics, in the units of summary.json, and folders.

    Metrics that are not finite are null, since JSON cannot hold them; the verdict reports them.
    """
    return json.dumps([_nested(row) for row in rows], indent=2, ensure_ascii=False, allow_nan=False)


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    "markdown": markdown,
    "csv": comma_separated,
    "json": json_text,
}


def _yes(value: bool | None) -> str:
    return NONE if value is None else "yes" if value else "no"


def _parameters(row: Row) -> str:
    published = (row.reference or {}).get("parameters")
    beside = "" if published is None else f" [{published:,}]"
    return f"{row.parameters:,}{beside}"


def _runs(row: Row) -> str:
    count = len(row.runs)
    if row.seeds == count:
        return str(count)
    return f"{count} ({'1 seed' if row.seeds == 1 else f'{row.seeds} seeds'})"


def _head(row: Row) -> dict[str, Any]:
    return {
        "experiment": row.label.experiment,
        "model": row.label.model,
        "solver": None if row.label.solver == NONE else row.label.solver,
        "continuous": row.label.continuous,
        "jacobian": row.label.jacobian,
        "settings": row.settings,
        "runs": len(row.runs),
        "seeds": row.seeds,
    }


def _flat(row: Row) -> dict[str, Any]:
    line = {
        key: _yes(value) if isinstance(value, bool) else value for key, value in _head(row).items()
    }
    line |= {
        "parameters": row.parameters,
        "parameters_published": (row.reference or {}).get("parameters"),
    }
    for name in METRICS:
        metric = row.metrics[name]
        line |= {
            name: metric.mean,
            f"{name}_deviation": metric.deviation,
            f"{name}_published": metric.published,
            f"{name}_published_deviation": metric.published_deviation,
        }
    return line | _verdict(row)


def _nested(row: Row) -> dict[str, Any]:
    reference = row.reference or {}
    return {
        **_head(row),
        "parameters": {"value": row.parameters, "published": reference.get("parameters")},
        "metrics": {
            name: _finite(metric)
            for name, metric in row.metrics.items()
            if metric.mean is not None or metric.published is not None
        },
        "reference": None
        if row.reference is None
        else {key: reference.get(key) for key in ("source", "seeds", "steps", "epochs")},
        **_verdict(row),
        "folders": [str(run.folder) for run in row.runs],
    }


def _finite(metric: Metric) -> dict[str, float | None]:
    return {
        key: None if value is None or not math.isfinite(value) else value
        for key, value in vars(metric).items()
    }


def _verdict(row: Row) -> dict[str, Any]:
    verdict = row.verdict
    return {
        "verdict": verdict.text,
        "difference": verdict.difference,
        "margin": verdict.margin,
    }
