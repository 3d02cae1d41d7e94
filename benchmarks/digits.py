"""The default experiment over models and solvers, one seed: accuracy, NFE and time in one table.

Each row is `python train.py model=… solver=…` in a process of its own, one after the other; the
figures are those of its summary.json.

    python benchmarks/digits.py --epochs 30
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODELS = ("deq", "skip_deq", "skip_reg_deq")
SOLVERS = ("lbroyden", "anderson", "tsit5")
TRAIN = Path(__file__).parents[1] / "train.py"


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description="Digits: models × solvers.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fixed = [f"trainer.max_epochs={arguments.epochs}", f"seed={arguments.seed}"]
    print(f"{arguments.epochs} epochs, seed {arguments.seed}")
    print("| model | solver | test accuracy % | without a solve % | test NFE | ms a step |")
    print("|---|---|---|---|---|---|", flush=True)
    for solver in SOLVERS:
        for model in MODELS:
            summary = run(f"model={model}", f"solver={solver}", *fixed)
            print(_row(model, solver, summary), flush=True)


def run(*overrides: str) -> dict[str, Any]:
    """Train once in a temporary folder; its summary."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), *overrides, f"paths.outputs={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*/*/*/summary.json")
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary


def _row(model: str, solver: str, summary: dict[str, Any]) -> str:
    figures = summary["figures"]
    explicit = figures.get("test/explicit_accuracy")
    cells = (
        model,
        solver,
        f"{100 * figures['test/accuracy']:.2f}",
        "" if explicit is None else f"{100 * explicit:.2f}",
        f"{figures['test/nfe']:.2f}",
        f"{summary['train_ms_per_step']:.1f}",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
