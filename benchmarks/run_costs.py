"""What it costs a training step to save the run's state, and what a second process gains.

python benchmarks/run_costs.py --repeats 3 experiment=mnist_fc model=skip_deq data.root=PATH

What follows the options goes to train.py; without it, the skip DEQ on the digits.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).parents[1] / "train.py"
COMMON = (
    *("trainer.accelerator=cpu", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"),
    "callbacks.resumption.minutes=null",
)
VARIANTS = {
    "never saved": (),
    "saved every 50 steps": ("callbacks.resumption.steps=50",),
    "saved every step": ("callbacks.resumption.steps=1",),
    "two processes": ("trainer=ddp_cpu", "trainer.devices=2"),
}
"""The others are compared with the first."""


def main() -> None:
    """Print milliseconds per step and their ratio to those of the first variant: of the whole
    training divided by its steps, and the median of the steps alone.
    """
    parser = argparse.ArgumentParser(description="Costs of a training step on the CPU.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    given, overrides = parser.parse_known_args()
    length = (f"trainer.max_steps={given.steps}", "trainer.max_epochs=-1")
    # In turns, so that a slow minute of the machine affects all of them.
    rounds = [
        [measured(*(overrides or ["model=skip_deq"]), *length, *each) for each in VARIANTS.values()]
        for _ in range(given.repeats)
    ]
    print(f"{'':20} {'all in':^32} {'the steps alone':^32}")
    for place, name in enumerate(VARIANTS):
        cells = [
            compared([each[place][kind] for each in rounds], [each[0][kind] for each in rounds])
            for kind in (0, 1)
        ]
        print(f"{name:20} {cells[0]:>32} {cells[1]:>32}")


def compared(times: list[float], first: list[float]) -> str:
    """The median time, and the ratios to the times of the first variant."""
    ratios = [one / other for one, other in zip(times, first, strict=True)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{statistics.median(times):.2f} ms, {spread}"


def measured(*overrides: str) -> tuple[float, float]:
    """Milliseconds per step, both kinds."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [str(TRAIN), *overrides, *COMMON, f"paths.run={run}"]
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    every = 1e3 * float(summary["train_seconds"]) / int(summary["steps"])
    return every, float(summary["train_ms_per_step"])


if __name__ == "__main__":
    main()
