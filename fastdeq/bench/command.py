"""The command ``fastdeq bench``: which solver, adjoint and precision a training step should use."""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from rich.console import Console

from fastdeq.autocast import Precision
from fastdeq.bench.compare import combinations, compare
from fastdeq.bench.step import configured_step, own_step
from fastdeq.bench.table import WIDTH, advice, table
from fastdeq.commands import Parser, UsageError, check_options, exit_status, typed, unknown_name
from fastdeq.experiment.explain import explain
from fastdeq.experiment.parts import as_typed, build_choices, build_parts, composed

_WEIGHTS = ("from_run=", "checkpoint=")
_T = TypeVar("_T")


def main(arguments: Sequence[str]) -> int:
    """Compare and print; returns the exit status."""
    return exit_status(partial(_run, arguments), Exception, explain=explain)


def _run(arguments: Sequence[str]) -> int:
    given = _parse(arguments)
    paths = [word for word in given.words if ":" in word and "=" not in word]
    words = as_typed([word for word in given.words if word not in paths])
    _check_words(paths, words)
    if paths:
        step = own_step(paths[0], composed(words).solver.per_sample)
    else:
        step = configured_step(build_parts(words))
    choices = build_choices(words)
    precisions = _precisions(choices.precision)
    wanted = combinations(
        _picked("solver", given.solvers, choices.solvers),
        _picked("adjoint", given.adjoints, choices.adjoints),
        _picked("precision", given.precisions, precisions),
    )
    found = compare(step, wanted, given.seconds)
    console = Console(file=sys.stdout)
    console.width = max(console.width, WIDTH)
    console.print(table(found))
    configured = _first(choices.solvers), _first(choices.adjoints), _first(precisions)
    refused = {**choices.refused, **found.refused}
    for line in advice(
        found, refused, configured=configured, seconds=given.seconds, own=bool(paths)
    ):
        print(line)
    if not paths and not any(word.startswith(_WEIGHTS) for word in words):
        print(
            "the weights are new, and a trained model may need another choice: give from_run=FOLDER"
        )
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog=typed("bench"),
        usage=f"{typed('bench')} [options] (OVERRIDE ... | PACKAGE.MODULE:FUNCTION)",
        description="Compare solvers, adjoints and precisions on one training step of a model and "
        "a batch, and recommend the fastest whose gradient is right.",
        examples=f"  {typed('bench')} model=skip_mdeq data=digits solver.tol=1e-3\n"
        f"  {typed('bench')} from_run=outputs/digits/skip_mdeq_lbroyden/DATE --seconds 120\n"
        f"  {typed('bench')} my_package.my_module:my_function --solvers anderson,picard",
    )
    parser.add_argument(
        "words",
        metavar="OVERRIDE",
        nargs="*",
        help="as for train; or a function that returns (cell, x), a module and its input, or "
        "(f, z0), a function of the state and its start",
    )
    parser.add_argument("--seconds", type=float, default=60, help="at most, about (60)")
    for group in ("solvers", "adjoints", "precisions"):
        parser.add_argument(f"--{group}", metavar="NAME,...", help="these only; by default all")
    # Not of `Parser`, which refuses what stands behind the first option.
    given, rest = argparse.ArgumentParser.parse_known_args(parser, list(arguments))
    check_options(rest, parser)
    given.words += rest
    if not given.seconds > 0:
        raise UsageError(f"--seconds is {given.seconds}, but must be above 0")
    return given


def _check_words(paths: Sequence[str], words: Iterable[str]) -> None:
    """Raises: UsageError for two functions, and for overrides that a function does not use."""
    if len(paths) > 1:
        raise UsageError(f"{paths[1]!r} is one function too many")
    for word in words if paths else ():
        if not word.lstrip("+~").startswith(("solver", "adjoint")):
            raise UsageError(
                f"{word} has no effect on {paths[0]}: give overrides of solver and adjoint only"
            )


def _first(known: Mapping[str, object]) -> str:
    return next(iter(known))


def _picked(what: str, names: str | None, known: Mapping[str, _T]) -> dict[str, _T]:
    if names is None:
        return dict(known)
    picked = names.split(",")
    for name in picked:
        if name not in known:
            raise UsageError(unknown_name(what, name, known))
    return {name: value for name, value in known.items() if name in picked}


def _precisions(configured: Precision | None) -> dict[str, Precision | None]:
    """The configured one first."""
    names: dict[str, Precision | None] = {"float32": None, "bf16": "bf16"}
    return dict(sorted(names.items(), key=lambda each: each[1] != configured))
