"""Rows of a report as Markdown, CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdeq.report.configuration import NONE
from fastdeq.report.markdown import aligned
from fastdeq.report.rows import METRICS, Row
from fastdeq.report.verdict import Metric


@dataclass(frozen=True)
class Column:
    """A metric's heading, format and factor in Markdown."""

    metric: str
    heading: str
    text: str
    factor: float = 1.0

    def cell(self, row: Row) -> str:
        """mean ± deviation [published ± deviation], without unknown parts."""
        metric = row.metrics[self.metric]
        if self.metric == "test/loss" and not row.judged_by_loss:
            return ""
        parts = [self._pair(metric.mean, metric.deviation)]
        if 0 < metric.n < row.seeds:
            parts.append(f"(n = {metric.n})")
        if published := self._pair(metric.published, metric.published_deviation):
            parts.append(f"[{published}]")
        return " ".join(part for part in parts if part)

    def _pair(self, mean: float | None, deviation: float | None) -> str:
        if mean is None:
            return ""
        spread = "" if deviation is None else f" ± {self.text.format(self.factor * deviation)}"
        return self.text.format(self.factor * mean) + spread


_COLUMNS = (
    Column("test/accuracy", "test accuracy %", "{:.2f}", 100.0),
    Column("test/accuracy_top5", "top-5 %", "{:.2f}", 100.0),
    Column("test/loss", "test loss", "{:.3g}"),
    Column("test/nfe", "test NFE", "{:.2f}"),
    Column("train/seconds", "training s/batch", "{:.3g}"),
    Column("train/backward_seconds", "backward s/batch", "{:.3g}"),
    Column("test/seconds", "prediction s/batch", "{:.3g}"),
    Column("training_minutes", "training min", "{:.1f}"),
)


def markdown(rows: Sequence[Row]) -> str:
    """The table with aligned columns."""
    return aligned(cells(rows))


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Headings, then the cells of each row; columns that are empty in all rows are left out."""
    several = len({row.label.experiment for row in rows}) > 1
    columns: dict[str, Callable[[Row], str]] = {
        **({"experiment": lambda row: row.label.experiment} if several else {}),
        "model": lambda row: row.label.model,
        "solver": lambda row: row.label.solver,
        "continuous": lambda row: _yes(row.label.continuous),
        "Jacobian reg.": lambda row: _yes(row.label.jacobian),
        "settings": lambda row: row.settings,
        "parameters": _parameters,
        "runs": _runs,
        **{column.heading: column.cell for column in _COLUMNS},
        "verdict": lambda row: row.verdict.text,
    }
    table = {heading: [cell(row) for row in rows] for heading, cell in columns.items()}
    kept = {heading: cells for heading, cells in table.items() if any(cells)}
    return [list(kept), *map(list, zip(*kept.values(), strict=True))]


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
