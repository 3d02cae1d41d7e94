"""Whether two run folders hold the same run, and two states the same tensors."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeq.runs.folder import FAILURE


def rows(folder: Path) -> list[dict[str, str]]:
    """Of metrics.csv, without times."""
    with (folder / "metrics.csv").open() as lines:
        return [
            {name: text for name, text in row.items() if "seconds" not in name}
            for row in csv.DictReader(lines)
        ]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    metrics = found["metrics"].items()
    found["metrics"] = {name: value for name, value in metrics if "seconds" not in name}
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "last.ckpt", weights_only=True)[
        "state_dict"
    ]
    return found


def failure_lines(folder: Path) -> list[str]:
    """What train.log says of steps that failed, without the time and the folder."""
    lines = (folder / "train.log").read_text().splitlines()
    found = [
        line.split(" ", 2)[2] for line in lines if re.match(r".{20}steps? [\d,]+( to|:)", line)
    ]
    return [line.rpartition("; step ")[0] or line for line in found]


def kept_step(folder: Path) -> bytes | None:
    """The failed step that was kept, with everything in it."""
    path = folder / FAILURE
    if not path.exists():
        return None
    content = io.BytesIO()
    torch.save(torch.load(path, weights_only=True), content)
    return content.getvalue()


def assert_same(one: Path, other: Path) -> None:
    assert failure_lines(one) == failure_lines(other)
    assert kept_step(one) == kept_step(other)
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a == b
    assert (one / "metrics.csv").read_text().splitlines()[0] == (
        other / "metrics.csv"
    ).read_text().splitlines()[0]
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert torch.equal(values, second[name]), name
    assert summary(one)["metrics"] == summary(other)["metrics"]
    for key in ("steps", "epochs", "score"):
        assert summary(one)[key] == summary(other)[key]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, equal_nan=True, msg=name)
