"""How much `import fastdeq.nn` adds to `import torch`: medians over alternating fresh processes.

python benchmarks/import_time.py [--runs 7]
"""

import argparse
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version

STATEMENTS = ("import torch", "import torch, fastdeq.nn")


def main() -> None:
    """Print the median seconds of both statements, their range and the difference."""
    parser = argparse.ArgumentParser(description="Measure what importing fastdeq costs.")
    parser.add_argument("--runs", type=int, default=7, help="processes for each statement")
    runs: int = parser.parse_args().runs
    if runs < 1:
        parser.error("--runs must be at least 1")
    times = measure(runs)
    print(f"Python {platform.python_version()}, torch {version('torch')}, {platform.machine()}")
    for statement, seconds in times.items():
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        print(f"{statement:24} median {statistics.median(seconds):.3f} s ({spread}, n = {runs})")
    alone, both = (statistics.median(times[statement]) for statement in STATEMENTS)
    print(f"fastdeq adds             {1000 * (both - alone):.1f} ms")


def measure(runs: int) -> dict[str, list[float]]:
    """Return the seconds of each statement in ``runs`` fresh processes, after one warm-up each."""
    times: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for run in range(runs + 1):
        # Alternating, so that a machine that slows down does so for both; the first round only
        # fills the disk cache and writes bytecode.
        for statement in STATEMENTS:
            seconds = seconds_of(statement)
            if run > 0:
                times[statement].append(seconds)
    return times


def seconds_of(statement: str) -> float:
    """Return how long ``statement`` takes in a fresh process, without the interpreter's start."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return float(result.stdout)


if __name__ == "__main__":
    main()
