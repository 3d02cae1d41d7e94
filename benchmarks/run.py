"""All measurements that the documentation quotes: one table, and the same as JSON.

python -m benchmarks.run [--only dense,memory] [--quick] [--json build/benchmarks.json]

Milliseconds are CPU time of one thread and belong to the machine; ratios within a row were measured
in turns, in one process. Without torchdeq (`pip install -c constraints.txt -e ".[bench]"`) its
column is left out.
"""

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import adjoints, dense, evaluations, memory, multiscale, train_step
from benchmarks.measuring import HAS_TORCHDEQ, SYSTEMS, Row
from fastdeq.report.markdown import aligned

ROOT = Path(__file__).resolve().parents[1]
SECTIONS: dict[str, Callable[[bool], Iterable[Row]]] = {
    "dense": dense.rows,
    "compiled": dense.compiled,
    "scaling": dense.scaling,
    "multiscale": multiscale.rows,
    "evaluations": evaluations.rows,
    "adjoints": adjoints.rows,
    "memory": memory.rows,
    "train": train_step.rows,
}
INSTALL = 'pip install -c constraints.txt -e ".[bench]"'


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(description="The benchmarks of fastdeq.")
    names = ",".join(SECTIONS)
    usual = ",".join(name for name in SECTIONS if name != "compiled")  # it takes minutes more
    parser.add_argument("--only", default=usual, help=f"sections, of {names}")
    parser.add_argument("--quick", action="store_true", help="small and without repetitions")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "benchmarks.json")
    given = parser.parse_args(arguments)
    wanted = given.only.split(",")
    if unknown := [name for name in wanted if name not in SECTIONS]:
        parser.error(f"--only: there is no section {unknown[0]!r}; choose from {names}")
    torch.set_num_threads(1)
    found: list[Row] = []
    seconds: dict[str, float] = {}
    for name in wanted:
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found += list(SECTIONS[name](given.quick))
        seconds[name] = round(time.perf_counter() - start, 1)
    about = {**_machine(), "seconds": seconds, "quick": given.quick}
    print(table(found))
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if not HAS_TORCHDEQ:
        print(f"torchdeq is not installed, and its column is left out: {INSTALL}")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "rows": [{**asdict(row), "ratios": row.ratios} for row in found]}
    given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def table(rows: Sequence[Row]) -> str:
    """As Markdown, with the columns that have a value."""
    systems = [name for name in SYSTEMS if any(name in row.values for row in rows)]
    ratios = list(dict.fromkeys(name for row in rows for name in row.ratios))
    heading = ["section", "case", "unit", *systems, *ratios, "note"]
    lines = [
        [
            *(row.section, row.case, row.unit),
            *(_shown(row.values.get(name)) for name in systems),
            *(_shown(row.ratios.get(name)) for name in ratios),
            row.note,
        ]
        for row in rows
    ]
    return aligned([heading, *lines])


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "machine": platform.machine(),
    }


if __name__ == "__main__":
    sys.exit(main())
