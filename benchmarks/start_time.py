"""How long a command takes before its first training step, each time in a fresh process.

python benchmarks/start_time.py --repeats 5
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "train.py"
LIBRARIES = "import torch, torchmetrics, pytorch_lightning, hydra, h5py"


def main() -> None:
    """Print medians in seconds, and what of them is the import of libraries."""
    parser = argparse.ArgumentParser(description="Seconds to the first step.")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    # In turns, so that a slow minute of the machine falls on all of them.
    rounds = [(importing(), composing(), stepping()) for _ in range(repeats)]
    names = ("importing the libraries", "composing (--cfg job)", "to the first step")
    for name, seconds in zip(names, zip(*rounds, strict=True), strict=True):
        print(f"{name:24} {statistics.median(seconds):5.2f} s  ({spread(seconds)})")


def importing() -> float:
    """Python, and the libraries alone."""
    return clocked(sys.executable, "-c", LIBRARIES)


def composing() -> float:
    """The whole command, up to the printed configuration."""
    return clocked(sys.executable, str(TRAIN), "--cfg", "job")


def stepping() -> float:
    """As the run itself counts: from the start of its process to that of its first step."""
    with tempfile.TemporaryDirectory() as folder:
        short = ["trainer=one_batch", f"paths.outputs={folder}"]
        subprocess.run([sys.executable, str(TRAIN), *short], check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*/*/*/summary.json")
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds_to_first_step"])


def clocked(*command: str) -> float:
    """Seconds of a command, start and end of its process included."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def spread(seconds: tuple[float, ...]) -> str:
    """Least and most."""
    return f"{min(seconds):.2f} to {max(seconds):.2f}"


if __name__ == "__main__":
    main()
