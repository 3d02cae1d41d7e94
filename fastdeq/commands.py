"""Shared parts of the commands of `fastdeq`: parser, exit statuses, how a command is typed, and
where conf/ is.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn


def _conf() -> Path:
    """A wheel has conf/ in the package, a checkout beside it."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


CONF = _conf()
"""The configuration tree that fastdeq brings."""


class UsageError(Exception):
    """An invalid command line; the message is one line."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, and names the nearest option or choice.

    examples: lines at the end of the help.
    """

    def __init__(self, *, examples: str = "", **options: Any) -> None:
        super().__init__(
            **options,
            epilog=f"examples:\n{examples}" if examples else None,
            allow_abbrev=False,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
        )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse unknown arguments here: this is also called for subparsers, with their options."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            check_options(unknown, self)
            raise UsageError(f"{unknown[0]!r} is one argument too many")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = action.dest.replace("_", " ")
            raise UsageError(unknown_name(what, value, action.choices))

    def error(self, message: str) -> NoReturn:
        """Raises: UsageError, instead of printing the usage and ending the process."""
        raise UsageError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def check_options(words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Raises: UsageError for the first word that looks like an option, with the nearest one."""
    known = [name for action in parser._actions for name in action.option_strings]
    for word in words:
        if word.startswith("-"):
            raise UsageError(unknown_name("option", word.partition("=")[0], known))


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name, with the nearest known name, or all of them."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    cure = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(names)}"
    return f"unknown {what} {name!r}: {cure}"


def exit_status(
    command: Callable[[], int],
    *errors: type[Exception],
    explain: Callable[[Exception], str] = str,
) -> int:
    """Call `command` and return its status; 1 for one of `errors` and 2 for a UsageError, each
    printed as one line to stderr.
    """
    try:
        return command()
    except SystemExit as end:  # of --help
        return int(end.code or 0)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except errors as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1


def typed(command: str) -> str:
    """How a subcommand was typed to start this process: `fastdeq data` or `python -m fastdeq data`;
    `python train.py` for train. In a process of submitit: `fastdeq`.
    """
    started = Path(sys.argv[0]).name
    if started == "train.py" and command == "train":
        return "python train.py"
    if started in ("train.py", "__main__.py"):
        return f"python -m fastdeq {command}"
    return f"fastdeq {command}"
