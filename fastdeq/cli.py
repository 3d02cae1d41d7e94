"""The command `fastdeq`, or `python -m fastdeq`: train, data, report, export-weights, jobs, bench.

Only the package of the subcommand that runs is imported: `fastdeq --help` needs neither torch nor
Lightning.
"""

import os
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from fastdeq import __version__
from fastdeq.commands import Parser, exit_status, typed
from fastdeq.extras import MissingExtra, extra_for
from fastdeq.streams import keep_streams, run_command

COMMANDS = {
    "train": ("fastdeq.experiment.train", "train and test one model, or a sweep of them (-m)"),
    "data": ("fastdeq.data.command", "prepare a data set, and show what it holds"),
    "report": ("fastdeq.report.command", "tabulate runs beside published metrics"),
    "report plots": ("fastdeq.report.plots_command", "draw runs, as PNG and PDF"),
    "report dynamics": (
        "fastdeq.report.dynamics_command",
        "draw the solver's steps of experiment=dynamics",
    ),
    "report html": ("fastdeq.report.html_command", "write a page about runs, in one file"),
    "export-weights": (
        "fastdeq.experiment.export_weights",
        "write weights as safetensors, with a model card",
    ),
    "jobs": ("fastdeq.cluster.command", "submit a sweep to Slurm, and follow its jobs"),
    "bench": (
        "fastdeq.bench.command",
        "compare solvers, adjoints and precisions on one step",
    ),
}
"""Where each subcommand's `main` is, and what it does."""

_COMPLETION = "fastdeq.completion"
"""Where the `main` of train's flag -sc is."""

EXTRAS = {
    "report plots": ("plots",),
    "report dynamics": ("plots",),
    "export-weights": ("safetensors",),
    "jobs": ("cluster",),
}
"""Extras that a subcommand needs beside `experiment`; see pyproject.toml."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a subcommand and end the process with its exit status: 0; 1 after an error; 2 for an
    invalid command line; 75 if something is not done yet.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["-sc"]:
        words = _completion(words)
    if words[:1] == ["train"] and words[1:2] != ["-sc"]:
        # These signals request a stop. While torch is being imported they would end the process, so
        # they are blocked until the run handles them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
        # A run has its train.log: what stdout cannot take does not end it.
        keep_streams()
        sys.exit(dispatch(words))
    run_command(dispatch, words)


def dispatch(arguments: Sequence[str]) -> int:
    """Import the subcommand that is named first, and call its `main` with the other arguments."""
    if not arguments:
        parser().print_help()
        return 2
    two = " ".join(arguments[:2])
    name = two if two in COMMANDS else arguments[0]
    rest = arguments[len(name.split(" ")) :]
    if name != two and not Path(arguments[1]).exists():
        of_two = [each for each in COMMANDS if " " in each]
        if similar := get_close_matches(two, of_two, n=1, cutoff=0.9):
            print(f"error: unknown command {two!r}: did you mean {similar[0]}?", file=sys.stderr)
            return 2
    if name not in COMMANDS:
        return exit_status(lambda: bool(parser().parse_args([name])))
    try:
        with extra_for(f"fastdeq {name}", "experiment", *EXTRAS.get(name, ())):
            completes = name == "train" and rest[:1] == ["-sc"]
            module = import_module(_COMPLETION if completes else COMMANDS[name][0])
    except MissingExtra as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    status: int = module.main(rest)
    return status


def _completion(words: list[str]) -> list[str]:
    """Hydra's completion script does not know subcommands: complete them here, or for train."""
    program, *before, last = os.environ.get("COMP_LINE", "fastdeq ").split(" ")
    if before[:1] == ["train"]:
        os.environ["COMP_LINE"] = " ".join([program, *before[1:], last])
        return ["train", *words]
    names = [name.split(" ") for name in COMMANDS]
    place = len(before)
    print(*sorted({name[place] for name in names if name[:place] == before and name[place:]}))
    sys.exit(0)


def parser() -> Parser:
    """The parser behind `fastdeq --help`; each subcommand has its own parser."""
    command = typed("").rstrip()
    made = Parser(
        prog=command,
        usage=f"{command} [-h] [--version] COMMAND ...",
        description="Train and compare deep equilibrium models.",
        examples=f"  {command} train model=skip_deq data=digits solver.tol=1e-3\n"
        f"  {command} train -m model=deq,skip_deq seed=1,2,3\n"
        f"  {command} report outputs\n"
        f"  {command} COMMAND --help",
    )
    made.add_argument("--version", action="version", version=f"fastdeq {__version__}")
    # argparse reserves the width of the metavar, without the indentation of the names below it.
    metavar = "COMMAND".ljust(max(map(len, COMMANDS)) + 2)
    commands = made.add_subparsers(dest="command", metavar=metavar, title="commands")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return made
