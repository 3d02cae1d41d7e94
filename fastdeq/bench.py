"""The command ``fastdeq bench``: runs benchmarks of a checkout. A wheel does not contain them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastdeq.commands import Parser, UsageError, exit_status, typed, unknown_name

FOLDER = Path(__file__).parents[1] / "benchmarks"


def main(arguments: Sequence[str]) -> int:
    """Run a benchmark with its own arguments; returns the exit status."""
    return exit_status(lambda: _run(list(arguments)), FileNotFoundError)


def _run(arguments: list[str]) -> int:
    names = [path.stem for path in sorted(FOLDER.glob("*.py"))]
    if not names:
        raise FileNotFoundError("there are no benchmarks here: a checkout of fastdeq has them")
    if not arguments or arguments[0].startswith("-"):
        _parser(names).parse_args(arguments or ["--help"])
    name, *rest = arguments
    if name not in names:
        raise UsageError(unknown_name("benchmark", name, names))
    command = [sys.executable, str(FOLDER / f"{name}.py"), *rest]
    return subprocess.run(command, check=False).returncode


def _parser(names: list[str]) -> Parser:
    made = Parser(
        prog=typed("bench"),
        description="Run a benchmark; what follows its name is for the benchmark.",
        examples=f"  {typed('bench')} {names[0]} --help",
    )
    made.add_argument("name", metavar="NAME", help=", ".join(names))
    return made
