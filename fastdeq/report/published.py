"""Published tables: report/published/<experiment>.yaml, for each experiment that has one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

TABLES = Path(__file__).parent / "published"


def published_row(config: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, Any] | None:
    """The published row to compare a run with, and the entries of the whole table: source, number
    of seeds, length of a run. None if nothing is published.

    config: resolved, plain containers. choices: of its groups. The run must have the values and
    choices that `where` of the row lists.
    """
    table = read_table(choices.get("experiment", ""))
    for row in table.pop("rows", ()):
        if all(_value(key, config, choices) == wanted for key, wanted in row["where"].items()):
            return {**table, **row}
    return None


def read_table(experiment: str) -> dict[str, Any]:
    """The table of an experiment; empty if there is none."""
    path = TABLES / f"{experiment}.yaml"
    if not path.is_file():
        return {}
    table: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return read_table(table["rows_of"]) if "rows_of" in table else table


def _value(key: str, config: Any, choices: Mapping[str, str]) -> Any:
    if key in choices:
        return choices[key]
    for name in key.split("."):
        config = config[name]
    return config
